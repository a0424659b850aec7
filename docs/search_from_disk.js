// On file:// browsers block the worker and the index of the search.
if (location.protocol === "file:")
  document.querySelector(".md-search__input").placeholder =
    "Search: python3 -m http.server -d build/docs"
