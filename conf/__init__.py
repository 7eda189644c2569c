"""The Hydra configurations; a package so that they are installed beside the code."""
