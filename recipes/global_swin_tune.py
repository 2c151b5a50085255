"""A published Swin-T given global tokens and fine-tuned for classes: recipe 2 of an article on global attention, one of
this library's sources. Swin: Liu et al. 2021, https://arxiv.org/abs/2103.14030.

    accelerate launch finetune.py --recipe global_swin_tune                      # demo(): a minute on two CPU cores
    accelerate launch finetune.py --recipe global_swin_tune --data photos/train/ --val photos/val/ --out runs/photos

The same command again goes on from the newest checkpoint in --out. recipe() begins with timm's published weights and
computes what those do, bit for bit, until it is trained: in the article each stage's features are replaced by those of
an untrained attention, so what was pretrained is lost, its tokens are the same behind each stage, and it attends across
the batch. How it is done here: ssl_global/encoders/global_swin.py. To pretrain such a Swin: dino_swin and mae_swin,
whose exports `--backbone` takes.

Expect   recipe(): unmeasured here. The authors, a plain Swin-T learnt on ImageNet-1k alone: 81.2 (README.md@005e8ef).
         demo(), 2026-11-21, 2 busy cores of a Xeon server, one thread, built-in sample, seeds 0, 1, 2: top-1 0.694,
         0.662, 0.709. What the tokens do for it: unmeasured.
Numbers  Four tokens, read and written behind each stage: the article's. microsoft/Swin-Transformer config.py@00f2800
         (augmentation, smoothing, mixing, clipping) and swin_tiny_patch4_window7_224_22kto1k_finetune.yaml@0ae00c9
         (epochs, warm-up, drop path), unless marked "ours".
"""

from dataclasses import replace

from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.finetuning.classify import ClassifyConfig
from ssl_global.recipe import Checkpoint, Crops, Data, Eval, Log, Optim, Recipe, Train, Views


def recipe() -> Recipe:
    return Recipe(
        data=Data(worker_kind="processes"),  # RandAugment holds Python's lock
        views=Views(
            globals=Crops(count=1, pixels=224, area=(0.08, 1.0), augment="rand-m9-mstd0.5-inc1", erase=0.25),
        ),
        encoder=PretrainedConfig(
            name="global_swin_tiny_patch4_window7_224",
            model_args='{"start": "identity", "num_global_tokens": 4}',
            weights="global_swin_tiny_patch4_window7_224.ms_in22k_ft_in1k",  # needs the network, once
            drop_path=0.1,
        ),
        method=ClassifyConfig(layer_decay=0.85, smoothing=0.1, mixup=0.8, cutmix=1.0),  # ours: theirs has no decay
        optim=Optim(
            lr_per_256_images=1e-4,  # ours: theirs is 1e-5 for all layers, at which what begins at 0 hardly moves
            lr_end=1e-6,  # ours, in the same proportion
            warmup_epochs=5,
            weight_decay=(0.05, 0.05),  # ours: theirs, 1e-8, is for an ImageNet-1k learnt from 22k
            clip_norm=5.0,
        ),
        train=Train(
            epochs=30,
            global_batch=1024,  # 128 on each of 8 GPUs
            micro_batch=64,  # ours
            precision="bf16",  # ours: theirs is fp16
        ),
        eval=Eval(every=1251),  # ours: an epoch of ImageNet
        log=Log(every=20),  # ours
        checkpoint=Checkpoint(every=500, keep=2),  # ours
    )


def demo() -> Recipe:
    """The same road on two CPU cores, from scratch, on dino_swin's demo network. All its numbers are ours."""
    full = recipe()
    return replace(
        full,
        data=Data(),
        views=Views(globals=Crops(count=1, pixels=32, area=(0.5, 1.0))),
        encoder=PretrainedConfig(name=full.encoder.name, model_args=DEMO_SWIN),
        method=replace(full.method, layer_decay=1.0, smoothing=0.0, mixup=0.0, cutmix=0.0),
        optim=replace(full.optim, lr_per_256_images=4e-3, lr_end=0.0, warmup_epochs=1),
        train=Train(epochs=6, global_batch=64),
        eval=Eval(every=1000),
        checkpoint=Checkpoint(every=200),
    )


DEMO_SWIN = (
    '{"start": "scratch", "patch_size": 4, "embed_dim": 48, "depths": [1, 1, 2], "num_heads": [2, 4, 8], '
    '"window_size": 4, "num_global_tokens": 4}'
)
