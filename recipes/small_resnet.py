"""ResNet-18 for 32-pixel images with 2D attention in it: from an article that compares five modules on CIFAR-10, one of
this library's sources. ResNet: He et al. 2015, https://arxiv.org/abs/1512.03385.

    accelerate launch finetune.py --recipe small_resnet                          # demo(): a minute on two CPU cores
    accelerate launch finetune.py --recipe small_resnet --data cifar10/train/ --val cifar10/test/ --out runs/cifar10

The same command again goes on from the newest checkpoint in --out. The article's rows, each module where its code has
it: SE and CBAM in each block before the addition, non-local behind the first three stages, and there the last two as
well, of which it does not say where. (With quotation marks, where a shell would look for files of such names.)

    --attention layer*.bn2=se
    --attention layer*.bn2=cbam
    --attention layer[123]=non_local
    --attention layer[123]=dual
    --attention layer[123]=criss_cross

`python -m benchmarks attention_table` trains all of them and compares.

Expect   recipe(): unmeasured here. The article: 92.34 % without a module, 93.56 to 94.12 % with one; of seeds,
         epochs and optimizer it says nothing, and its criss-cross cannot run.
         demo(), 2026-11-21, 2 busy cores of a Xeon server, one thread, built-in sample, seed 0: top-1 0.639; with the
         modules no more (benchmarks/attention_table.py).
Numbers  The article's are the network, the batch, mean and deviation. All others are ours.
"""

from dataclasses import replace

from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.finetuning.classify import ClassifyConfig
from ssl_global.recipe import Checkpoint, Crops, Data, Eval, Log, Optim, Recipe, Train, Views


def recipe() -> Recipe:
    return Recipe(
        data=Data(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
        views=Views(globals=Crops(count=1, pixels=32, area=(0.5, 1.0), flip=0.5)),  # ours: the article has neither
        encoder=PretrainedConfig(name="resnet18_small"),
        method=ClassifyConfig(layer_decay=1.0, smoothing=0.0, mixup=0.0, cutmix=0.0),
        optim=Optim(
            lr_per_256_images=4e-3,  # 1e-3 at a batch of 64
            lr_end=0.0,
            warmup_epochs=1,
            weight_decay=(0.05, 0.05),
        ),
        train=Train(epochs=30, global_batch=64),
        eval=Eval(every=3910),  # five epochs of CIFAR-10
        log=Log(every=50),
        checkpoint=Checkpoint(every=782, keep=2),
    )


def demo() -> Recipe:
    """The same road on two CPU cores: a quarter of the channels, few epochs."""
    full = recipe()
    return replace(
        full,
        encoder=replace(full.encoder, model_args='{"channels": [16, 32, 64, 128]}'),
        optim=replace(full.optim, warmup_epochs=0.5),
        train=replace(full.train, epochs=3),
        eval=Eval(every=1000),
        log=Log(every=20),
        checkpoint=Checkpoint(every=200),
    )
