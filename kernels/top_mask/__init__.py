"""The n largest scores of every row, exactly, with one order of ties."""
