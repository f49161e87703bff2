"""Who runs where: one file per engine, found by its name, and what engines share."""
