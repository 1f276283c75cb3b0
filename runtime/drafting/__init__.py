"""Who guesses the next token, how sure the guess is, and how far to go on guessing."""
