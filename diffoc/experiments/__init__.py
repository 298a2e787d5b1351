"""The tables: methods, the cells of a table, their records, summaries, and the ledger."""
