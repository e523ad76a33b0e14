"""What a person sees: the terminal, charts, reports, pages."""
