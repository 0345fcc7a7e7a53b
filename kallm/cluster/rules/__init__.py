"""What breaks the rules of a site; `kallm.cluster.site` says which site has which."""
