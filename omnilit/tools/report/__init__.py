"""`omnilit report`: runs as one page, from the files that they left."""
