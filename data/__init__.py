"""What flows between the stages. Nothing here knows of models or autoencoders."""
