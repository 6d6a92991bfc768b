"""What joins the tower to a language model."""
