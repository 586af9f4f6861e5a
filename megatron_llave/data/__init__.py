"""What a training run reads: shards and their index, tokenizer and images, the mixture, and packed micro batches."""
