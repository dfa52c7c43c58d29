"""The report's claims in small: variants of one recipe trained side by side, a table, a figure, an honest verdict."""
