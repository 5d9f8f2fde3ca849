"""Classification of microscope images of many channels, some of them missing (FastVim's JUMP-CP experiment)."""
