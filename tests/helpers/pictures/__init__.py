"""What tests of models with pictures share."""
