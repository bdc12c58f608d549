// How much of the model's context a conversation fills.

const length = ({ user, answer }) => user.length + answer.length;
const sum = (values) => values.reduce((total, value) => total + value, 0);

// Returns { tokens, isExact }: as the server counted them with the last answer, and estimated from
// the number of characters for what came after it, and for a message that is not sent yet.
export function contextUse({ system, leftOut, turns }, draft, isChat) {
  const sent = isChat ? turns.slice(leftOut) : turns.slice(-1);
  const counted = sent.findLastIndex((turn) => turn.total);
  const characters = sum(sent.slice(counted + 1).map(length)) + (isChat ? draft.length : 0) + (counted < 0 && isChat ? system.length : 0);
  const estimated = Math.ceil(characters * tokensPerCharacter(turns));
  return { tokens: (sent[counted]?.total ?? 0) + estimated, isExact: !estimated };
}

function tokensPerCharacter(turns) {
  const counted = turns.filter((turn) => turn.tokens && turn.answer);
  return counted.length ? sum(counted.map((turn) => turn.tokens)) / sum(counted.map((turn) => turn.answer.length)) : 0.3;
}

// Returns how many of the oldest turns to leave out so that the others fill half of the context.
export function turnsToLeaveOut({ leftOut, turns }, used, context) {
  const sent = turns.slice(leftOut);
  const perCharacter = used / Math.max(1, sum(sent.map(length)));
  let count = 0;
  for (let left = used; count < sent.length - 1 && left > context / 2; count++) left -= perCharacter * length(sent[count]);
  return count;
}
