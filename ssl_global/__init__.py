"""ssl_global: self-supervised pretraining of vision backbones. The way in is pretrain.py; README.md has the tree."""

from ssl_global.encoders import global_swin as global_swin  # timm knows their models from here on
from ssl_global.encoders import small_resnet as small_resnet
