"""How worker processes start, and what travels to them."""
