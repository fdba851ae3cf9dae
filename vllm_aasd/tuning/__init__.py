"""Speed against damage: prompts, scores and statistics, and which settings are worth it. Knows nothing of engines."""
