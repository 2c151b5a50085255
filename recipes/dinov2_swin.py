"""DINOv2's loss on a Swin-T with global tokens: iBOT's setting (Zhou et al. 2021, https://arxiv.org/abs/2111.07832).

    accelerate launch pretrain.py --recipe dinov2_swin                           # demo(): minutes on two CPU cores
    accelerate launch --multi_gpu pretrain.py --recipe dinov2_swin --data '/data/in1k/train-{000000..001281}.tar' \
        --val '/data/in1k/val-{000000..000049}.tar' --out runs/dinov2_swin       # recipe(): 300 epochs

The same command again goes on from the newest checkpoint in --out. What is hidden are cells of the last stage, 32
pixels wide, as theirs. DINOv2's other teacher:

    --method.centring sinkhorn --method.separate-heads

Expect   recipe(): unmeasured here. The authors, a plain Swin-T/14 and mean pooling: k-NN 76.2, linear 79.3 on ImageNet.
         demo(), 2026-11-22, 2 cores of a Xeon server, one thread, built-in sample, k-NN against untrained:
         0.580 / 0.416, 0.560 / 0.423, 0.540 / 0.429 (seeds 0, 1, 2; 127 s of training); raw pixels 0.264.
Numbers  bytedance/ibot README.md (Swin-T/14) and main_ibot.py's defaults, unless marked "ours"; colours are DINO's, on
         which it builds.
"""

from dataclasses import replace

from ssl_global.encoders.global_swin import GlobalSwinConfig
from ssl_global.methods.dinov2 import Dinov2Config
from ssl_global.recipe import Checkpoint, Crops, Data, Eval, Explain, Log, Optim, Recipe, Train, Views


def recipe() -> Recipe:
    return Recipe(
        data=Data(),  # ImageNet's mean and deviation
        views=Views(
            globals=Crops(
                count=2, pixels=224, area=(0.25, 1.0), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(1.0, 0.1), solarize=(0.0, 0.2),
            ),
            locals=Crops(
                count=10, pixels=96, area=(0.05, 0.25), flip=0.5, jitter=0.8, brightness=0.4, contrast=0.4,
                saturation=0.2, hue=0.1, grey=0.2, blur=(0.5,), solarize=(0.0,),
            ),
        ),
        encoder=GlobalSwinConfig(
            name="global_swin_tiny_patch4_window7_224",
            window=14,
            tokens=8,  # ours
            pool="token",  # ours: theirs is the mean of the patches
            drop_path=0.1,
        ),
        method=Dinov2Config(
            prototypes=8192,
            head_hidden=2048,
            head_bottleneck=256,
            separate_heads=False,
            student_temp=0.1,
            teacher_temp=(0.04, 0.07),
            teacher_temp_warmup_epochs=30,
            teacher_momentum=(0.996, 1.0),
            centring="softmax",
            centre_momentum=0.9,
            freeze_prototypes_epochs=1,  # their norms are fixed at 1, which theirs are not
            ibot_weight=1.0,  # ours: from the first epoch, theirs from the fiftieth
            hidden_share=0.5,
            hidden_ratio=(0.1, 0.5),  # 0.3, 0.2 more or less
            koleo_weight=0.1,  # ours, DINOv2's: iBOT has none
            koleo_images=26,  # of a GPU
            layer_decay=1.0,
            patch_embed_lr=1.0,
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
            epochs=300,
            global_batch=1040,  # 26 on each of 40 GPUs
            micro_batch=26,
            precision="bf16",  # ours: theirs is fp16
        ),
        eval=Eval(every=6200),  # ours: five epochs of ImageNet
        log=Log(every=50),  # ours
        explain=Explain(every=6200, attention_every=500),  # ours
        checkpoint=Checkpoint(every=1000, keep=2),  # ours
    )  # fmt: skip


def demo() -> Recipe:
    """The same road on two CPU cores: small views, a small Swin, few prototypes. All its numbers are ours."""
    paper = recipe()
    # As in dino's demo: colour is what tells the photographs apart, so it stays.
    return replace(
        paper,
        views=Views(
            globals=replace(paper.views.globals, pixels=32, area=(0.2, 1.0), saturation=0.0, hue=0.0, grey=0.0),
            locals=replace(paper.views.locals, pixels=16, area=(0.05, 0.3), count=4, saturation=0.0, hue=0.0, grey=0.0),
        ),
        encoder=GlobalSwinConfig(patch=4, width=96, depths=(1, 3), heads=(4, 8), window=4, pool="token"),
        method=replace(
            paper.method,
            prototypes=1024, head_hidden=512, head_bottleneck=128, teacher_momentum=(0.99, 1.0),
            teacher_temp=(0.04, 0.04), teacher_temp_warmup_epochs=0, koleo_images=64,
        ),
        optim=replace(paper.optim, lr_per_256_images=2e-3, warmup_epochs=1, weight_decay=(0.04, 0.1)),
        train=Train(epochs=4, global_batch=64),
        eval=Eval(every=94),
        log=Log(every=20),
        explain=Explain(every=94, attention_every=94),
        checkpoint=Checkpoint(every=100),
    )  # fmt: skip
