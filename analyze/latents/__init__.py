"""What is known of latents: where they fire, what they write, what they are worth."""
