"""What the model reads: layout, plan, tools and answers by schema."""
