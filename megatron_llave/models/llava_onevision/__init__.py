"""LLaVA-OneVision, the family that LLaVE is made of."""
