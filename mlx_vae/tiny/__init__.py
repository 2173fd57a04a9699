"""The embedded model: `AutoencoderKL.from_pretrained("tiny")`."""
