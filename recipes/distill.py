"""Distilling a frozen teacher into small students, without labels: feature matching and multi-crop with DINO's loss.

    accelerate launch pretrain.py --recipe dino                                  # the demo's teacher: runs/dino/export
    accelerate launch pretrain.py --recipe distill --method.teacher runs/dino/export    # demo(): minutes on two cores
    accelerate launch --multi_gpu pretrain.py --recipe distill --data '/data/in1k/train-{000000..001281}.tar' \
        --val '/data/in1k/val-{000000..000049}.tar' --out runs/distill           # recipe(): from DINOv2's ViT-L/14

The teacher is an export's or a run's folder, or a timm name with its .tag. The same command again goes on from the
newest checkpoint in --out, and reads the teacher again: it is in no checkpoint.

    --method.students resnet18 convnext_atto

learns these too, in the same run, from the same pass of the teacher; the encoder is the one that is judged and lies in
export/ at the end, `ssl-global export RUN --what resnet18 --out FOLDER` writes another.

Expect   recipe(): unmeasured here.
         demo(), 2026-11-22, 2 cores of a Xeon server that four to ten other jobs shared, one thread, built-in sample,
         from dino:demo's export (k-NN 0.657; seed 0), seeds 0, 1, 2:

             the student distilled                 0.644, 0.650, 0.648    mean 0.647, deviation 0.003
             the same from scratch, dino:demo      0.598, 0.617, 0.598    mean 0.604, deviation 0.011
             untrained                             0.547, 0.527, 0.503

         at equal steps (dino:demo with encoder.width 96, encoder.depth 2; at this recipe's rate it gets 0.582, seed 0).
         So it gains 9.8, 12.3 and 14.4 points over the untrained student; seed 0's cannot gain more than the 11 that
         its teacher is above it.
Numbers  temperatures, momenta, views, batch and optimizer are DINO's (https://arxiv.org/abs/2104.14294,
         facebookresearch/dino main_dino.py@7c446df), as DINOv2 distils with what it pretrains with
         (https://arxiv.org/abs/2304.07193, section 5); no stochastic depth, as there; the terms' weights are ours.
"""

from dataclasses import replace

from ssl_global.encoders.vit import VitConfig
from ssl_global.methods.distill import DistillConfig
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
        method=DistillConfig(
            teacher="vit_large_patch14_dinov2.lvd142m",
            summary_weight=1.0,
            patch_weight=1.0,
            dino_weight=1.0,
            prototypes=65_536,
            head_hidden=2048,
            head_bottleneck=256,
            student_temp=0.1,
            teacher_temp=0.04,
            head_momentum=(0.996, 1.0),
            centre_momentum=0.9,
        ),
        optim=Optim(
            lr_per_256_images=5e-4,
            lr_end=1e-6,
            warmup_epochs=10,
            weight_decay=(0.04, 0.4),
            betas=(0.9, 0.999),
            clip_norm=3.0,
        ),
        train=Train(
            epochs=100,
            global_batch=512,
            micro_batch=64,
            precision="bf16",  # ours: theirs is fp16
        ),
        eval=Eval(every=12_500),  # ours: five epochs of ImageNet
        log=Log(every=50),  # ours
        explain=Explain(every=12_500, attention_every=500),  # ours
        checkpoint=Checkpoint(every=1000, keep=2),  # ours
    )  # fmt: skip


def demo() -> Recipe:
    """The same road on two CPU cores: a student of an eighth of the weights of dino:demo's backbone, from its export.
    All its numbers are ours."""
    paper = recipe()
    # Seventeen photographs differ in colour more than in anything else: it stays, light and contrast vary.
    return replace(
        paper,
        views=Views(
            globals=replace(paper.views.globals, pixels=32, area=(0.2, 1.0), saturation=0.0, hue=0.0, grey=0.0),
            locals=replace(paper.views.locals, pixels=16, area=(0.05, 0.3), count=4, saturation=0.0, hue=0.0, grey=0.0),
        ),
        encoder=VitConfig(name="vit_tiny_patch16_224", patch=8, width=96, depth=2),
        method=replace(
            paper.method, teacher="runs/dino/export", prototypes=1024, head_hidden=512, head_bottleneck=128,
            head_momentum=(0.99, 1.0),
        ),
        optim=replace(paper.optim, lr_per_256_images=2e-3, warmup_epochs=1, weight_decay=(0.04, 0.04)),
        train=Train(epochs=8, global_batch=64),
        eval=Eval(every=94),
        log=Log(every=20),
        explain=Explain(every=94, attention_every=94),
        checkpoint=Checkpoint(every=100),
    )  # fmt: skip
