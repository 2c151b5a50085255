"""ssl_global: self-supervised pretraining of vision backbones. The way in is pretrain.py; README.md has the tree."""
