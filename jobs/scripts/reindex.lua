#!lua flags=allow-oom
-- Put the index right for jobs that stock RQ moved or deleted. ARGV: ttl, ids. Answers how many are known.
local known = 0
for i = 2, #ARGV do
  local id = ARGV[i]
  local job = load(id)
  if job then
    known = known + 1
    note_end(id, job)
    if job.closed and not is_final(job.state) then reopen(id, job) end
    if job.place ~= job.state then
      move(id, job, job.state)
      call('HSET', K.job .. id, 'place', job.state)
    end
  end
  for _, kind in ipairs(KINDS) do
    for _, state in ipairs(STATES) do
      if not (job and job.kind == kind and job.place == state) then call('ZREM', K.index .. kind .. ':' .. state, id) end
    end
  end
end
return known
