"""What the Qwen-VL families share: Qwen2-VL, Qwen2.5-VL and Qwen3-VL; a folder of each has its FAMILY."""
