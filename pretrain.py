"""Pretrain a backbone: `accelerate launch pretrain.py --recipe dino`. README.md says how it goes on."""

from ssl_global.pretrain import main

if __name__ == "__main__":
    main()
