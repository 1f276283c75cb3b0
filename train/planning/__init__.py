"""What a fit will take, before anything is bought or downloaded."""
