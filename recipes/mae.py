"""MAE, ViT-B/16: the authors' setting (He et al. 2021, https://arxiv.org/abs/2111.06377).

    accelerate launch pretrain.py --recipe mae                                   # demo(): minutes on two CPU cores
    accelerate launch --multi_gpu pretrain.py --recipe mae --data '/data/in1k/train-{000000..001281}.tar' \
        --val '/data/in1k/val-{000000..000049}.tar' --out runs/mae               # recipe(): 800 epochs

The same command again goes on from the newest checkpoint in --out.

Expect   recipe(): unmeasured here. The authors, after 1600 epochs of ImageNet: linear probe 67.8, fine-tuned 83.6
         (FINETUNE.md).
         demo(), 2026-11-22, 2 busy cores of a Xeon server, one thread, built-in sample, linear probe against untrained:
         0.714 / 0.589, 0.689 / 0.626, 0.664 / 0.602 (seeds 0, 1, 2; 222 s for the first); k-NN +18.8, +17.6, +14.4.
         900 images judge, so a figure is good to 1.5 points; more epochs or a deeper encoder did not raise it.
Numbers  facebookresearch/mae PRETRAIN.md, main_pretrain.py, models_mae.py@efb2a80, unless marked "ours".
"""

from dataclasses import replace

from ssl_global.encoders.vit import VitConfig
from ssl_global.methods.mae import MaeConfig
from ssl_global.recipe import Checkpoint, Crops, Data, Eval, Explain, Log, Optim, Recipe, Train, Views


def recipe() -> Recipe:
    return Recipe(
        data=Data(),  # ImageNet's mean and deviation
        views=Views(globals=Crops(count=1, pixels=224, area=(0.2, 1.0), flip=0.5)),
        encoder=VitConfig(name="vit_base_patch16_224", positions="sincos"),
        method=MaeConfig(mask_ratio=0.75, decoder_width=512, decoder_depth=8, decoder_heads=16),
        optim=Optim(
            lr_per_256_images=1.5e-4,
            lr_end=0.0,
            warmup_epochs=40,
            weight_decay=(0.05, 0.05),
            betas=(0.9, 0.95),
            clip_norm=None,
        ),
        train=Train(
            epochs=800,
            global_batch=4096,  # 64 on each of 8 GPUs of 8 machines
            micro_batch=64,
            precision="bf16",  # ours: theirs is fp16
        ),
        eval=Eval(every=6250),  # ours: twenty epochs of ImageNet
        log=Log(every=20),  # ours
        explain=Explain(every=6250, attention_every=500),  # ours
        checkpoint=Checkpoint(every=500, keep=2),  # ours
    )


def demo() -> Recipe:
    """The same road on two CPU cores: small views, a small ViT and decoder. All its numbers are ours."""
    paper = recipe()
    return replace(
        paper,
        views=Views(globals=replace(paper.views.globals, pixels=32)),
        encoder=VitConfig(name="vit_tiny_patch16_224", patch=4, depth=3, positions="sincos", pool="avg"),
        method=MaeConfig(decoder_width=64, decoder_depth=2, decoder_heads=4),
        optim=replace(paper.optim, lr_per_256_images=1e-3, warmup_epochs=2),
        train=Train(epochs=20, global_batch=64),
        eval=Eval(every=234, linear=True),
        log=Log(every=20),
        explain=Explain(every=234, attention_every=234),
        checkpoint=Checkpoint(every=200),
    )
