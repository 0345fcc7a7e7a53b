"""Likelihoods and replies of many texts: what they share is computed once, by a whole model or a trunk and a tail."""
