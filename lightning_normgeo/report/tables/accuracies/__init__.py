"""Tables of accuracies: under attack, by attack, without a result, paired over runs, and with rescaled weights."""
