"""What a model is given: item to sample to row to batch; LaTRO's prompts, rollouts and credit."""
