"""DINO with multi-crop, ViT-S/16: the authors' small setting (Caron et al. 2021, https://arxiv.org/abs/2104.14294).

    accelerate launch pretrain.py --recipe dino                                  # demo(): minutes on two CPU cores
    accelerate launch --multi_gpu pretrain.py --recipe dino --data '/data/in1k/train-{000000..001281}.tar' \
        --val '/data/in1k/val-{000000..000049}.tar' --out runs/dino              # recipe(): 100 epochs

The same command again goes on from the newest checkpoint in --out.

Expect   recipe(): unmeasured here. The authors: k-NN 69.3, linear 74.0 on ImageNet, 1.75 days on 8 GPUs (README.md).
         demo(), 2026-11-21, 2 cores of a Xeon server, one thread, built-in sample, k-NN against untrained:
         0.657 / 0.499, 0.620 / 0.490, 0.619 / 0.512 (seeds 0, 1, 2; about 160 s when alone); raw pixels 0.264.
         From that export (seed 0) with a new head, --encoder.weights runs/dino --seed 1 --train.epochs 2
         --optim.lr-per-256-images 2.5e-4: 0.657, 0.657, 0.658, after 0, 1 and 2 epochs; four end at 0.653.
         At the recipe's own rate it falls to 0.617 in six epochs: more than eval.max_fall allows.
Numbers  facebookresearch/dino main_dino.py@7c446df, its defaults, unless marked "ours".
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
                count=2, pixels=224, area=(0.4, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(1.0, 0.1), solarize=(0.0, 0.2),
            ),
            locals=Crops(
                count=8, pixels=96, area=(0.05, 0.4), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(0.5,), solarize=(0.0,),
            ),
        ),
        encoder=VitConfig(name="vit_small_patch16_224", drop_path=0.1),
        method=DinoConfig(
            prototypes=65_536,
            head_hidden=2048,
            head_bottleneck=256,
            student_temp=0.1,
            teacher_temp=(0.04, 0.04),
            teacher_temp_warmup_epochs=0,
            teacher_momentum=(0.996, 1.0),
            centre_momentum=0.9,
            freeze_prototypes_epochs=1,
        ),
        optim=Optim(
            lr_per_256_images=5e-4,
            lr_end=1e-6,
            warmup_epochs=10,
            weight_decay=(0.04, 0.4),
            betas=(0.9, 0.999),  # AdamW's defaults, as theirs
            clip_norm=3.0,  # theirs clips each tensor by itself, ours the whole gradient
        ),
        train=Train(
            epochs=100,
            global_batch=512,  # 64 on each of 8 GPUs
            micro_batch=64,
            precision="bf16",  # ours: theirs is fp16
        ),
        eval=Eval(every=12_500),  # ours: five epochs of ImageNet
        log=Log(every=50),  # ours
        explain=Explain(every=12_500, attention_every=500),  # ours
        checkpoint=Checkpoint(every=1000, keep=2),  # ours
    )  # fmt: skip


def demo() -> Recipe:
    """The same road on two CPU cores: small views, a small ViT, few prototypes. All its numbers are ours."""
    paper = recipe()
    # Seventeen photographs differ in colour more than in anything else: it stays, light and contrast vary.
    return replace(
        paper,
        views=Views(
            globals=replace(paper.views.globals, pixels=32, area=(0.2, 1.0), saturation=0.0, hue=0.0, grey=0.0),
            locals=replace(paper.views.locals, pixels=16, area=(0.05, 0.3), count=4, saturation=0.0, hue=0.0, grey=0.0),
        ),
        encoder=VitConfig(name="vit_tiny_patch16_224", patch=8, depth=3),
        method=replace(
            paper.method, prototypes=1024, head_hidden=512, head_bottleneck=128, teacher_momentum=(0.99, 1.0)
        ),
        optim=replace(paper.optim, lr_per_256_images=1e-3, warmup_epochs=1, weight_decay=(0.04, 0.1)),
        train=Train(epochs=8, global_batch=64),
        eval=Eval(every=94),
        log=Log(every=20),
        explain=Explain(every=94, attention_every=94),
        checkpoint=Checkpoint(every=100),
    )
