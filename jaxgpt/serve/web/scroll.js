// The page moves along with an answer, unless a person has scrolled up.

import { at } from "./dom.js";

const root = document.documentElement;
const latest = at("latest"); // the button that goes to the end
let isFollowing = true;
let lastTop = 0;

const fromEnd = () => root.scrollHeight - root.clientHeight - root.scrollTop;
const showButton = () => (latest.hidden = isFollowing || fromEnd() < 96);

// Call when what is shown has changed.
export function keepUp() {
  if (isFollowing) scrollTo({ top: root.scrollHeight, behavior: "instant" });
  showButton();
}

export function followAnswer() {
  isFollowing = true;
}

addEventListener("scroll", () => {
  if (fromEnd() < 4) isFollowing = true;
  else if (root.scrollTop < lastTop) isFollowing = false;
  lastTop = root.scrollTop;
  showButton();
}, { passive: true });

latest.addEventListener("click", () => {
  followAnswer();
  keepUp();
  at("text").focus();
});
