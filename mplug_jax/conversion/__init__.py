"""Weights of other projects: official mPLUG, CLIP, DINOv2 and BERT files, and back."""
