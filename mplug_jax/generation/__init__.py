"""Decoding: texts from the decoder's next-token logits."""
