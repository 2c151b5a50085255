"""A short last phase at larger crops, after a run of `dino` (Siméoni et al. 2025, "DINOv3", section 5.1,
https://arxiv.org/abs/2508.10104; before it Oquab et al. 2023, "DINOv2", https://arxiv.org/abs/2304.07193).

    accelerate launch pretrain.py --recipe hires                                 # demo(): from runs/dino, minutes
    accelerate launch --multi_gpu pretrain.py --recipe hires --encoder.weights runs/dino --out runs/dino_hires \
        --data '/data/in1k/train-{000000..001281}.tar' --val '/data/in1k/val-{000000..000049}.tar'    # 10 epochs

It begins from an encoder that there is (encoder.weights: a run, an export, a timm name.tag, a file) and refuses one
that is not of encoder.*. Positions are interpolated to the larger grid, once, and learnt on. The head is new, theirs
goes on: it is trained first, on an encoder that waits for encoder.frozen_epochs. The same command again goes on.

With a Swin, encoder.* as in `dino_swin`, windows stay as large as encoder.window, and there are more of them. Where the
map had been smaller than that they grow with it, and their tables of position bias are interpolated.

Expect   recipe(): unmeasured here.
         demo(), 2026-11-22, one thread of a busy Xeon server, after dino's demo (seed 0): k-NN at 64 pixels 0.660
         before, 0.660, 0.664, 0.662 on the way, 0.663 after: little, but nothing lost. Raw pixels 0.264; dino's demo
         itself at its 32 pixels 0.657.
Numbers  crops of 512 and 112 pixels, weight decay that stays, a quarter of its rate:
         facebookresearch/dinov3@0f84b8b configs/train/dinov3_vit7b16_high_res_adapt.yaml, DINOv3's 30 x 1000 steps of
         4096 images (it mixes in 768 pixels, and has a Gram loss); the others recipes/dino.py's, or marked "ours".
"""

from dataclasses import replace

from ssl_global.encoders.vit import VitConfig
from ssl_global.methods.dino import DinoConfig
from ssl_global.recipe import Checkpoint, Crops, Data, Eval, Explain, Log, Optim, Recipe, Train, Views


def recipe() -> Recipe:
    return Recipe(
        data=Data(),  # ImageNet's mean and deviation
        views=Views(
            globals=Crops(
                count=2, pixels=512, area=(0.4, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(1.0, 0.1), solarize=(0.0, 0.2),
            ),
            locals=Crops(
                count=8, pixels=112, area=(0.05, 0.4), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(0.5,), solarize=(0.0,),
            ),
        ),
        encoder=VitConfig(
            name="vit_small_patch16_224",
            weights="runs/dino",
            frozen_epochs=1,  # ours
            drop_path=0.1,
        ),
        method=DinoConfig(
            prototypes=65_536,
            head_hidden=2048,
            head_bottleneck=256,
            student_temp=0.1,
            teacher_temp=(0.04, 0.04),
            teacher_temp_warmup_epochs=0,
            teacher_momentum=(0.996, 1.0),
            centre_momentum=0.9,
            freeze_prototypes_epochs=0,  # ours: while the encoder waits, all of the head can learn
        ),
        optim=Optim(
            lr_per_256_images=1.25e-4,  # theirs goes from 5e-5 to 1.25e-5; but half a cosine down, ours
            lr_end=1e-6,
            warmup_epochs=1,  # ours
            weight_decay=(0.4, 0.4),  # where the run before ended
            betas=(0.9, 0.999),
            clip_norm=3.0,
        ),
        train=Train(
            epochs=10,  # ours: a tenth of the run before
            global_batch=512,
            micro_batch=16,  # ours
            precision="bf16",  # ours
        ),
        eval=Eval(every=2500),  # ours: an epoch of ImageNet
        log=Log(every=50),  # ours
        explain=Explain(every=12_500, attention_every=500),  # ours
        checkpoint=Checkpoint(every=1000, keep=2),  # ours
    )  # fmt: skip


def demo() -> Recipe:
    """From `dino`'s demo: twice its pixels, a quarter of its length. All its numbers are ours."""
    paper = recipe()
    # As in dino's demo: colour is what tells the photographs apart, so it stays.
    return replace(
        paper,
        views=Views(
            globals=replace(paper.views.globals, pixels=64, area=(0.2, 1.0), saturation=0.0, hue=0.0, grey=0.0),
            locals=replace(paper.views.locals, pixels=32, area=(0.05, 0.3), count=4, saturation=0.0, hue=0.0, grey=0.0),
        ),
        encoder=VitConfig(name="vit_tiny_patch16_224", patch=8, depth=3, weights="runs/dino", frozen_epochs=0.5),
        method=replace(
            paper.method, prototypes=1024, head_hidden=512, head_bottleneck=128, teacher_momentum=(0.99, 1.0)
        ),
        optim=replace(paper.optim, lr_per_256_images=5e-4, warmup_epochs=0.25, weight_decay=(0.1, 0.1)),
        train=Train(epochs=2, global_batch=64),
        eval=Eval(every=24),
        log=Log(every=20),
        explain=Explain(every=94, attention_every=94),
        checkpoint=Checkpoint(every=100),
    )
