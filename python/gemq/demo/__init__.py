"""Assets of `gemq demo`: a small trained MoE model and public-domain text."""
