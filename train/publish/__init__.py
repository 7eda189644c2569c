"""A finished run as a folder for the Hugging Face Hub."""
