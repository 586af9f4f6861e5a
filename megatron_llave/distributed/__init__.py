"""Process groups, parallel layouts, collectives over rows, and the CPU emulation of torch.cuda."""
