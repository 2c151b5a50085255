"""Fine-tune a backbone: `accelerate launch finetune.py --backbone runs/dino/export`. README.md says how it goes on."""

from ssl_global.finetune import main

if __name__ == "__main__":
    main()
