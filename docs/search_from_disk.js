// Browsers give pages on the disk no search: they run no worker and read no index there.
if (location.protocol === "file:")
  document.querySelector(".md-search__input").placeholder =
    "Search: python3 -m http.server -d build/docs"
