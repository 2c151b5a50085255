"""Global-local consistency by InfoNCE, ViT-S/16 with DINO's multi-crop views.

    accelerate launch pretrain.py --recipe consistency                           # demo(): minutes on two CPU cores
    accelerate launch --multi_gpu pretrain.py --recipe consistency --data '/data/in1k/train-{000000..001281}.tar' \
        --val '/data/in1k/val-{000000..000049}.tar' --out runs/consistency       # recipe(): 300 epochs

The same command again goes on from the newest checkpoint in --out. Negatives are the images that all processes look at
at once: give it as many as fit, without accumulation.

Expect   recipe(): unmeasured here.
         demo(), 2026-11-22, 2 cores of a Xeon server, one thread, built-in sample, k-NN against untrained:
         0.666 / 0.499, 0.680 / 0.490, 0.671 / 0.512 (seeds 0, 1, 2; raw pixels 0.264); 155 s in all for seed 0.
Numbers  the temperature is the sources' and SimCLR's (https://arxiv.org/abs/2002.05709), the projector's widths
         SimCLR's; views are DINO's (https://arxiv.org/abs/2104.14294, main_dino.py@7c446df); the optimizer's are those
         of MoCo v3, which is InfoNCE on ViTs (https://arxiv.org/abs/2104.02057, facebookresearch/moco-v3 CONFIG.md,
         ViT-Small); all else is ours.
"""

from dataclasses import replace

from ssl_global.encoders.vit import VitConfig
from ssl_global.methods.consistency import ConsistencyConfig
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
        encoder=VitConfig(name="vit_small_patch16_224"),
        method=ConsistencyConfig(temp=0.1, projector_hidden=2048, projector_width=128),
        optim=Optim(
            lr_per_256_images=1.5e-4,
            warmup_epochs=40,
            weight_decay=(0.1, 0.1),
            betas=(0.9, 0.999),
        ),
        train=Train(
            epochs=300,
            global_batch=4096,
            precision="bf16",  # ours: theirs is fp16
        ),
        eval=Eval(every=1565),  # ours: five epochs of ImageNet
        log=Log(every=50),  # ours
        explain=Explain(every=1565, attention_every=500),  # ours
        checkpoint=Checkpoint(every=500, keep=2),  # ours
    )  # fmt: skip


def demo() -> Recipe:
    """The same road on two CPU cores: small views, a small ViT, a small projector. All its numbers are ours."""
    paper = recipe()
    # Seventeen photographs differ in colour more than in anything else: it stays, light and contrast vary.
    return replace(
        paper,
        views=Views(
            globals=replace(paper.views.globals, pixels=32, area=(0.2, 1.0), saturation=0.0, hue=0.0, grey=0.0),
            locals=replace(paper.views.locals, pixels=16, area=(0.05, 0.3), count=4, saturation=0.0, hue=0.0, grey=0.0),
        ),
        encoder=VitConfig(name="vit_tiny_patch16_224", patch=8, depth=3),
        method=replace(paper.method, projector_hidden=512),
        optim=replace(paper.optim, lr_per_256_images=2e-3, warmup_epochs=1, weight_decay=(0.04, 0.04), clip_norm=3.0),
        train=Train(epochs=8, global_batch=64),
        eval=Eval(every=94),
        log=Log(every=20),
        explain=Explain(every=94, attention_every=94),
        checkpoint=Checkpoint(every=100),
    )
