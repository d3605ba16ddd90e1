"""Ready fast variants of generative models."""
