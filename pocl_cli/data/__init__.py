"""From a data set to token ids: `sources` reads rows, `split` holds some out, `tokenise` stores their token ids."""
