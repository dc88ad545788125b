"""The worker: it loads the model once and answers OpenAI requests, whatever carries them."""
