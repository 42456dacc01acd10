-- The ledger's state and every change of it. ARGV[1] names the command.
--
-- Redis runs a script from its first line at each call, and to define every function costs more than most commands do. So
-- a section that defines commands (function C....) is sent for its own commands alone (store.py); what several sections
-- need stands in one that defines none.
--
-- Contract
--   KEYS[1]  mp:{<run_id>}:run; every other key of the run has the same prefix and so the same hash slot.
--   ARGV[1]  command, ARGV[2] the time in ms ('' = Redis's own clock; tests inject theirs), ARGV[3..] its arguments.
--   Answers {'', ...} or {'!', REASON, name, value, ...}. A command checks everything, then writes: Lua does not roll
--   back. What LeaseStep evicts stands even when the step cannot be filled.
--
-- Keys (P = mp:{<run_id>}:)
--   P run              hash    configuration (`config` JSON as now, `config0` as created, and the numbers that scripts
--                              need), counters of the states, committed / leased / trimmed steps, term and stated_term,
--                              pub_version / pub_label, next_version, seq (prompts), seal_seq (seals), schema
--   P p:<prompt_id>    hash    one prompt's account, see ROW below
--   P b:<prompt_id>    string  the prompt as it was put; deleted when it is dropped outside of a step
--   P g:<prompt_id>    string  payload of its sealed group; deleted at trim, eviction and drop
--   P put:<i>          string  payload of the i-th group that is put, only within the transaction that puts it (MULTI, MSET,
--                              this script, EXEC): a seal renames it, and what was not sealed is deleted
--   P index            zset    prompt_id by order of acceptance
--   P waiting          zset    prompt_id by order of acceptance, so that what is requeued stands at the front
--   P rolling          zset    prompt_id by expiry of its lease in ms
--   P rolling_labels   zset    prompt_id by the label published when it was leased
--   P rolling_stale    zset    the same, only prompts that were requeued for staleness
--   P ready            zset    <seal number, 16 digits>:<prompt_id> by oldest label; ties break by seal number
--   P inst:<instance>  set     prompt_ids leased by one gateway instance
--   P gateways         hash    gateway_id -> its newest instance
--   P superseded       set     instances that were replaced
--   P src:<source_id>  hash    digest, cursor, closed (0/1), waiting (its prompts in WAITING)
--   P sources          set     source_ids ever opened;  P sources_open  set  those not closed
--   P sizes            hash    step -> number of groups it was leased with
--   P ids:<step>       list    its prompt_ids in order
--   P step:<step>      hash    bound (max_staleness when leased), resumes (since its last commit)
--   P holes            zset    steps restated from a manifest whose payloads are not here
--   P v:<version>      hash    label, state (1 reserved, 2 published, 3 void), term, members, at (ms)
--   P reserved         set     versions reserved and neither published nor void
--   P reservations     hash    <term>:<step>:<attempt> -> version, of the newest term
--   P router           hash    id, term, expiry (ms) of the router's lease
--   P log              list    JSON audit log of configuration changes
--   P audit            hash    the audit under way: token, at (ms), what it has counted so far by counter; `audit` of the
--                              run is the seq up to which it has visited rows
--   P wake             channel letters of what changed: p may start rolling, s a step may fill, c credits, v versions
--
-- ROW: state, att (attempt), dig (digest of the prompt), seq, src, inst (lease holder), llab (label at lease), fail
--   (expired or failed leases), stale (requeues), seal (digest of the group), lab (oldest label), sseq (seal number),
--   bytes (payload held), facts (opaque summary for the consumer), step, pos, age (staleness), bound, why (drop reason),
--   note, tomb (1: restated after Redis forgot).

local SCHEMA = '1'
local WAITING, ROLLING, READY, ASSIGNED, TRAINED, DROPPED = 1, 2, 3, 4, 5, 6
local COUNTER = {'waiting', 'rolling', 'ready', 'assigned', 'trained'}
local ATTEMPTS, STALE, TAIL, GAP = 7, 8, 9, 10
local ON_STALE_WAIT, ON_STALE_DROP, TAIL_DROP, POLICY_MASK = 2, 3, 2, 3
local GAP_FAIL, GAP_DROP = 1, 3
local RESERVED, PUBLISHED, VOID = 1, 2, 3
local POISON_RESUMES = 3
local REAP_LIMIT = 512
local TRIM_LIMIT = 4096
local REPLY_BYTES = 8 * 1024 * 1024
local AUDIT_IDLE_MS = 10000  -- an audit that has not gone on for so long is given up

local P = string.sub(KEYS[1], 1, -4)
local call = redis.call
local C = {}

-- ------------------------------------------------------------------------------------------------ run

local run, dirty, topics = {}, {}, {}

local function load_run()
  local flat = call('HGETALL', KEYS[1])
  for i = 1, #flat, 2 do run[flat[i]] = flat[i + 1] end
  return run.schema ~= nil
end
local function num(f) return tonumber(run[f] or 0) end
local function set(f, v) run[f] = v; dirty[f] = true end
local function add(f, n) set(f, num(f) + n) end
local function wake(letter) topics[letter] = true end

local function finish()
  local flat = {}
  for f in pairs(dirty) do flat[#flat + 1] = f; flat[#flat + 1] = run[f] end
  if #flat > 0 then call('HSET', KEYS[1], unpack(flat)) end
  local letters = ''
  for letter in pairs(topics) do letters = letters .. letter end
  if letters ~= '' then call('PUBLISH', P .. 'wake', letters) end
end

local now_ms
local function now()
  if not now_ms then
    if ARGV[2] ~= '' then
      now_ms = tonumber(ARGV[2])
    else
      local t = call('TIME')
      now_ms = tonumber(t[1]) * 1000 + math.floor(tonumber(t[2]) / 1000)
    end
  end
  return now_ms
end

local function key_of(n) return string.format('%.0f', n) end
local function fail(reason, ...) return {'!', reason, ...} end

-- ------------------------------------------------------------------------------------------------ rows

local FIELDS = {'state', 'att', 'dig', 'seq', 'src', 'inst', 'llab', 'fail', 'stale', 'seal', 'lab', 'sseq', 'bytes',
                'facts', 'step', 'pos', 'age', 'bound', 'why', 'note', 'tomb'}
local NUMERIC = {state = true, att = true, seq = true, llab = true, fail = true, stale = true, lab = true, sseq = true,
                 bytes = true, step = true, pos = true, age = true, bound = true, why = true}

local ABSENT = {__index = {}}  -- a number that a row does not hold reads as 0, and rawget tells that it is not there
for f in pairs(NUMERIC) do ABSENT.__index[f] = 0 end

local function read(id)
  local flat = call('HGETALL', P .. 'p:' .. id)
  if #flat == 0 then return nil end
  local row = setmetatable({id = id}, ABSENT)
  for i = 1, #flat, 2 do
    local f, v = flat[i], flat[i + 1]
    row[f] = NUMERIC[f] and tonumber(v) or v
  end
  return row
end

-- The fields of a row that a command needs, and those that every change of a row needs. What was not read counts as not
-- there: it may be written, and must not be erased.
local function read_fields(id, fields)
  local values = call('HMGET', P .. 'p:' .. id, 'state', 'seq', 'bytes', 'why', unpack(fields))
  if not values[1] then return nil end
  local row = setmetatable({id = id, state = tonumber(values[1]), seq = tonumber(values[2]), bytes = tonumber(values[3] or 0),
                            why = values[4] and tonumber(values[4]) or nil}, ABSENT)
  for i, f in ipairs(fields) do
    local v = values[i + 4]
    if v then row[f] = NUMERIC[f] and tonumber(v) or v end
  end
  return row
end

local function counter_of(state, why) return state == DROPPED and 'dropped:' .. why or COUNTER[state] end

-- Takes a row out of what the audit under way has counted (-1), or puts it in (1).
local function recount(row, sign)
  call('HINCRBY', P .. 'audit', counter_of(row.state, row.why), sign)
  if row.bytes > 0 then call('HINCRBY', P .. 'audit', 'payload_bytes', key_of(sign * row.bytes)) end
end

-- Every change of a row but its creation; what it holds already is not written again. An audit goes row by row, in many
-- calls: what it has counted follows here.
local function write(row, changes)
  local counted = run.audit and row.seq <= num('audit')
  if counted then recount(row, -1) end
  local flat = {}
  for f, v in pairs(changes) do
    if rawget(row, f) ~= v then row[f] = v; flat[#flat + 1] = f; flat[#flat + 1] = v end
  end
  if #flat > 0 then call('HSET', P .. 'p:' .. row.id, unpack(flat)) end
  if counted then recount(row, 1) end
end

local function erase(row, ...)
  local held = {}
  for _, f in ipairs({...}) do if rawget(row, f) ~= nil then row[f] = nil; held[#held + 1] = f end end
  if #held > 0 then call('HDEL', P .. 'p:' .. row.id, unpack(held)) end
end

-- A command of many arguments, a thousand at a time: Lua's stack ends at some thousands.
local function call_in_parts(name, key, args)
  for from = 1, #args, 1000 do call(name, key, unpack(args, from, math.min(#args, from + 999))) end
end

local function ready_member(row) return string.format('%016.0f', row.sseq) .. ':' .. row.id end

local function count_waiting(row, n)
  if row.src and row.src ~= '' then call('HINCRBY', P .. 'src:' .. row.src, 'waiting', n) end
end

local function uncount(row)
  if row.state == DROPPED then add('dropped:' .. row.why, -1) else add(COUNTER[row.state], -1) end
end

-- Takes a row out of the index of its state. Whoever calls it puts the row into another state next.
local function leave(row)
  if row.state == WAITING then
    call('ZREM', P .. 'waiting', row.id); count_waiting(row, -1); wake('c')
  elseif row.state == ROLLING then
    call('ZREM', P .. 'rolling', row.id); call('ZREM', P .. 'rolling_labels', row.id)
    if row.stale > 0 then call('ZREM', P .. 'rolling_stale', row.id) end
    call('SREM', P .. 'inst:' .. row.inst, row.id); wake('s')
  elseif row.state == READY then
    call('ZREM', P .. 'ready', ready_member(row))
  end
  uncount(row)
end

local function free_payload(row)
  if row.bytes == 0 then return 0 end
  call('UNLINK', P .. 'g:' .. row.id)
  add('payload_bytes', -row.bytes)
  write(row, {bytes = 0})
  wake('p')
  return 1
end

local function to_waiting(row, extra)
  leave(row)
  add('waiting', 1)
  call('ZADD', P .. 'waiting', row.seq, row.id)
  count_waiting(row, 1)
  extra.state = WAITING
  write(row, extra)
  erase(row, 'inst')
  wake('p')
end

-- Back to the queue under a new attempt: what was sealed is void.
local function requeue(row, extra)
  free_payload(row)
  extra.att = row.att + 1
  to_waiting(row, extra)
  erase(row, 'seal', 'lab', 'sseq', 'facts', 'step', 'pos', 'age', 'bound', 'why', 'note')
end

local function drop(row, why, note)
  leave(row)
  free_payload(row)
  call('UNLINK', P .. 'b:' .. row.id)
  add('dropped:' .. why, 1)
  write(row, {state = DROPPED, why = why, note = note})
  erase(row, 'inst')
  wake('p'); wake('s')
end

local function to_ready(row, changes)
  leave(row)
  add('ready', 1)
  changes.state = READY
  write(row, changes)
  call('ZADD', P .. 'ready', row.lab, ready_member(row))
  wake('s')
end

-- A lease that ended without a seal and counts against max_attempts.
local function failed_lease(row, why, note)
  if row.fail + 1 >= num('max_attempts') then
    write(row, {fail = row.fail + 1})
    drop(row, why, note)
    return true
  end
  to_waiting(row, {fail = row.fail + 1})
  return false
end

local function reap()
  local expired = call('ZRANGEBYSCORE', P .. 'rolling', '-inf', now(), 'LIMIT', 0, REAP_LIMIT)
  for _, id in ipairs(expired) do
    add('expired', 1)
    failed_lease(read(id), ATTEMPTS, 'leases expired')
  end
end

local function next_expiry()
  local first = call('ZRANGE', P .. 'rolling', 0, 0, 'WITHSCORES')
  return first[2] and math.max(0, tonumber(first[2]) - now()) or -1
end

-- ------------------------------------------------------------------------------------------------ admission

-- Groups that may start rolling by the staleness rule: the places of steps up to p+1+S that are not leased, less what is
-- READY or ROLLING. Steps <= p are among them where they are not leased any more (a gap that is rolled out again). What is
-- leased past p+1+S (steps behind such a gap) takes no place of theirs: counted, it would keep the gap open for ever.
local function admissible()
  if num('pub_version') == 0 then return 0 end
  local p, committed = num('pub_label'), num('committed')
  local last = p + 1 + num('max_staleness')
  local room, size = -num('ready') - num('rolling'), num('groups_per_step')
  for from = committed + 1, last, 1000 do
    local names = {}
    for i = from, math.min(last, from + 999) do names[#names + 1] = key_of(i) end
    for _, leased in ipairs(call('HMGET', P .. 'sizes', unpack(names))) do
      if not leased then room = room + size end
    end
  end
  return room
end

local function admissible_by_bytes()
  return math.floor((num('max_payload_bytes') - num('payload_bytes')) / num('max_group_bytes')) - num('rolling')
end

local function checkpoint_wanted() return 2 * num('payload_bytes') > num('max_payload_bytes') and 1 or 0 end

local function credits(source)
  local limit = (num('max_staleness') + 2) * num('groups_per_step')
  local free = math.max(0, limit - num('waiting'))
  if source == '' then return free end
  local open = math.max(1, call('SCARD', P .. 'sources_open'))
  local held = tonumber(call('HGET', P .. 'src:' .. source, 'waiting') or 0)
  return math.max(0, math.min(free, math.ceil(limit / open) - held))
end

-- ------------------------------------------------------------------------------------------------ terms, steps

local function fence(term)
  local newest = num('term')
  if term < newest then return fail('STALE_TERM', 'term', key_of(term), 'newest', key_of(newest)) end
  if term > newest then return fail('UNKNOWN_TERM', 'term', key_of(term), 'newest', key_of(newest)) end
  return nil
end

local function fence_stated(term)
  local refused = fence(term)
  if refused then return refused end
  if num('stated_term') ~= term then return fail('NOT_RESUMED', 'term', key_of(term)) end
  return nil
end

local function step_size(step) return tonumber(call('HGET', P .. 'sizes', key_of(step)) or 0) end
local function step_ids(step) return call('LRANGE', P .. 'ids:' .. key_of(step), 0, -1) end

local function parse_dropped(from, n)
  local dropped = {}
  for i = 0, n - 1 do dropped[ARGV[from + 2 * i]] = tonumber(ARGV[from + 2 * i + 1]) end
  return dropped
end

-- A row of a committed step. Its payload stays until the step is trimmed, dropped or not: a resume gets it again.
local function settle(row, step, pos, why)
  leave(row)
  write(row, {state = why and DROPPED or TRAINED, step = step, pos = pos, why = why})
  if why then
    add('dropped:' .. why, 1)
  else
    erase(row, 'why'); add('trained', 1)
  end
end

-- ------------------------------------------------------------------------------------------------ run commands

-- create(config_json, name, number, ...) -> created
function C.create()
  if load_run() then
    if run.config == ARGV[3] or run.config0 == ARGV[3] then return {'', 0} end
    return fail('RUN_EXISTS', 'config', run.config)
  end
  set('schema', SCHEMA); set('config', ARGV[3]); set('config0', ARGV[3]); set('created_ms', now()); set('next_version', 1)
  for i = 4, #ARGV, 2 do set(ARGV[i], ARGV[i + 1]) end
  return {'', 1}
end

function C.get() return {'', call('HGETALL', KEYS[1]), call('SCARD', P .. 'sources'), call('SCARD', P .. 'sources_open')} end

-- update(old_config_json, new_config_json, comment, name, number, ...)
function C.update()
  if run.config ~= ARGV[3] then return fail('CONFIG_RACE', 'config', run.config) end
  local entry = {at_ms = now(), comment = ARGV[5], before = ARGV[3], after = ARGV[4]}
  set('config', ARGV[4])
  for i = 6, #ARGV, 2 do set(ARGV[i], ARGV[i + 1]) end
  call('RPUSH', P .. 'log', cjson.encode(entry))
  wake('p'); wake('s'); wake('c')
  return {''}
end

function C.log() return {'', call('LRANGE', P .. 'log', 0, -1)} end

-- ------------------------------------------------------------------------------------------------ sources, prompts

-- open_source(source, digest) -> cursor, credits, closed
function C.open_source()
  local source, digest = ARGV[3], ARGV[4]
  local key = P .. 'src:' .. source
  if call('SADD', P .. 'sources', source) == 1 then
    call('HSET', key, 'digest', digest, 'cursor', '', 'closed', 0, 'waiting', 0)
    call('SADD', P .. 'sources_open', source)
    wake('c')
  end
  local v = call('HMGET', key, 'digest', 'cursor', 'closed')
  if digest ~= '' and v[1] == '' then call('HSET', key, 'digest', digest); v[1] = digest end
  if digest ~= '' and v[1] ~= digest then return fail('SOURCE_DIGEST', 'stored', v[1], 'given', digest) end
  return {'', v[2], credits(source), tonumber(v[3])}
end

function C.close_source()
  if call('SISMEMBER', P .. 'sources', ARGV[3]) == 0 then return fail('UNKNOWN_SOURCE') end
  if call('SREM', P .. 'sources_open', ARGV[3]) == 1 then
    call('HSET', P .. 'src:' .. ARGV[3], 'closed', 1)
    wake('s'); wake('c')
  end
  return {'', call('SCARD', P .. 'sources_open')}
end

-- 'new', 'same' or 'other'.
local function compare_prompt(id, digest)
  local known = call('HMGET', P .. 'p:' .. id, 'state', 'dig')
  if not known[1] then return 'new' end
  if known[2] == digest then return 'same' end
  if known[2] == '' then call('HSET', P .. 'p:' .. id, 'dig', digest); return 'same' end
  return 'other'
end

local function accept_prompt(source, id, digest, body)
  add('seq', 1); add('accepted', 1); add('waiting', 1)
  local seq = num('seq')
  call('HSET', P .. 'p:' .. id, 'state', WAITING, 'att', 0, 'dig', digest, 'seq', seq, 'src', source)
  call('SET', P .. 'b:' .. id, body)
  call('ZADD', P .. 'index', seq, id)
  call('ZADD', P .. 'waiting', seq, id)
  if source ~= '' then call('HINCRBY', P .. 'src:' .. source, 'waiting', 1) end
  wake('p')
end

-- Where in the batch the stored cursor stands, if everything up to there is known: then the batch is a repetition.
local function repeated_prefix(stored, n)
  for i = 1, n do
    local a = 5 + (i - 1) * 4
    if compare_prompt(ARGV[a + 1], ARGV[a + 2]) ~= 'same' then return nil end
    if ARGV[a + 4] == stored then return i end
  end
  return nil
end

-- put(source, expected_cursor, n, then n times id, digest, body, cursor) -> accepted, duplicates, credits, cursor, blocked
function C.put()
  local source, expected, n = ARGV[3], ARGV[4], tonumber(ARGV[5])
  local stored, from = '', 1
  if source ~= '' then
    local v = call('HMGET', P .. 'src:' .. source, 'cursor', 'closed')
    if not v[1] then return fail('UNKNOWN_SOURCE') end
    if v[2] == '1' then return fail('SOURCE_CLOSED') end
    stored = v[1]
    if stored ~= expected then
      local known = repeated_prefix(stored, n)
      if not known then return fail('CURSOR', 'stored', stored, 'expected', expected) end
      from = known + 1
    end
  end
  local free, blocked, accepted, duplicates, cursor = credits(source), '', from - 1, from - 1, stored
  if num('payload_bytes') >= 0.8 * num('max_payload_bytes') then free = 0; blocked = 'BYTES' end
  for i = from, n do
    local a = 5 + (i - 1) * 4
    local kind = compare_prompt(ARGV[a + 1], ARGV[a + 2])
    if kind == 'other' then
      if i == 1 then return fail('PROMPT_EXISTS', 'prompt_id', ARGV[a + 1]) end
      blocked = 'CONFLICT'; break
    end
    if kind == 'new' and free == 0 then
      if blocked == '' then blocked = 'CREDITS' end
      break
    end
    if kind == 'new' then
      accept_prompt(source, ARGV[a + 1], ARGV[a + 2], ARGV[a + 3]); free = free - 1
    else
      duplicates = duplicates + 1
    end
    accepted = i
    if source ~= '' and ARGV[a + 4] ~= '' then cursor = ARGV[a + 4] end
  end
  if cursor ~= stored then call('HSET', P .. 'src:' .. source, 'cursor', cursor) end
  return {'', accepted, duplicates, free, cursor, blocked}
end

-- cancel(ids...) -> cancelled, not cancelled
function C.cancel()
  local yes, no = {}, {}
  for i = 3, #ARGV do
    local row = read(ARGV[i])
    if row and row.state <= READY then drop(row, 6, 'cancelled'); yes[#yes + 1] = row.id else no[#no + 1] = ARGV[i] end
  end
  return {'', yes, no}
end

-- ------------------------------------------------------------------------------------------------ leases

-- Leases of the gateway's former instance go back to the queue at once.
local function take_over(gateway, instance)
  local former = call('HGET', P .. 'gateways', gateway)
  if former == instance then return true end
  if call('SISMEMBER', P .. 'superseded', instance) == 1 then return false end
  call('HSET', P .. 'gateways', gateway, instance)
  if former then
    call('SADD', P .. 'superseded', former)
    for _, id in ipairs(call('SMEMBERS', P .. 'inst:' .. former)) do to_waiting(read(id), {}) end
  end
  return true
end

-- lease(gateway, instance, max) -> reason, next expiry in ms, version, label, ttl_ms, samples, {id, body, attempt, ...}
function C.lease()
  local instance, want = ARGV[4], tonumber(ARGV[5])
  if not take_over(ARGV[3], instance) then return fail('INSTANCE_SUPERSEDED', 'instance_id', instance) end
  reap()
  local room, bytes, waiting = admissible(), admissible_by_bytes(), num('waiting')
  local n = math.max(0, math.min(want, room, bytes, waiting))
  local reason = ''
  if n < want then
    if num('pub_version') == 0 then reason = 'no weights published'
    elseif n == waiting then reason = 'no prompts'
    elseif room <= bytes then reason = 'staleness bound'
    else reason = 'bytes' end
  end
  local out, label, expiry = {}, num('pub_label'), now() + num('lease_ttl_ms')
  local ids = n > 0 and call('ZRANGE', P .. 'waiting', 0, n - 1) or {}
  local reply_bytes = 0
  for _, id in ipairs(ids) do
    local row, body = read(id), call('GET', P .. 'b:' .. id)
    reply_bytes = reply_bytes + #body
    if reply_bytes > REPLY_BYTES and #out > 0 then break end
    leave(row)
    add('rolling', 1)
    write(row, {state = ROLLING, att = row.att + 1, inst = instance, llab = label})
    call('ZADD', P .. 'rolling', expiry, id)
    call('ZADD', P .. 'rolling_labels', label, id)
    if row.stale > 0 then call('ZADD', P .. 'rolling_stale', label, id) end
    call('SADD', P .. 'inst:' .. instance, id)
    out[#out + 1] = id; out[#out + 1] = body; out[#out + 1] = row.att
  end
  return {'', reason, next_expiry(), num('pub_version'), label, num('lease_ttl_ms'), num('samples_per_prompt'), out}
end

local function held(id, attempt, instance)
  local row = read(id)
  if row and row.state == ROLLING and row.att == tonumber(attempt) and row.inst == instance then return row end
  return nil
end

-- renew(instance, most, id, attempt, ...) -> ttl_ms, {indices of the lost ones, from 0}, {id, attempt, ...}: at most
-- `most` leases of the instance that are not among these
function C.renew()
  local lost, renewed, others, expiry = {}, {}, {}, now() + num('lease_ttl_ms')
  for i = 5, #ARGV, 2 do
    if held(ARGV[i], ARGV[i + 1], ARGV[3]) then
      call('ZADD', P .. 'rolling', expiry, ARGV[i])
      renewed[ARGV[i]] = true
    else
      lost[#lost + 1] = (i - 5) / 2
    end
  end
  local most = 2 * tonumber(ARGV[4])
  for _, id in ipairs(most > 0 and call('SMEMBERS', P .. 'inst:' .. ARGV[3]) or {}) do
    if #others >= most then break end
    local attempt = not renewed[id] and call('HGET', P .. 'p:' .. id, 'att')
    if attempt then others[#others + 1] = id; others[#others + 1] = tonumber(attempt) end
  end
  return {'', num('lease_ttl_ms'), lost, others}
end

-- release(instance, drop_reason, detail, failed, exhausted_reason, id, attempt, ...) -> released, dropped
function C.release()
  local why, note, failed, exhausted = tonumber(ARGV[4]), ARGV[5], ARGV[6] == '1', tonumber(ARGV[7])
  local released, dropped = 0, 0
  for i = 8, #ARGV, 2 do
    local row = held(ARGV[i], ARGV[i + 1], ARGV[3])
    if row then
      released = released + 1
      if why > 0 then
        drop(row, why, note); dropped = dropped + 1
      elseif failed then
        if failed_lease(row, exhausted > 0 and exhausted or ATTEMPTS, note) then dropped = dropped + 1 end
      else
        to_waiting(row, {})
      end
    end
  end
  return {'', released, dropped}
end

-- ------------------------------------------------------------------------------------------------ seals

local SEALED, DUPLICATE, LOST, CONFLICT, NO_VERSION, INVALID, NO_PROMPT = 1, 2, 3, 4, 5, 6, 7

local known_versions = {}  -- label and state of each, read once a call

-- Oldest label of the versions, or a status and the version that has none.
local function oldest_label(row, versions)
  local label
  for version in string.gmatch(versions, '%d+') do
    local v = known_versions[version] or call('HMGET', P .. 'v:' .. version, 'label', 'state')
    known_versions[version] = v
    if not v[1] or tonumber(v[2]) == RESERVED then return nil, {NO_VERSION, 'version', version} end
    if tonumber(v[2]) == VOID then return nil, {INVALID, 'void', version} end
    label = math.min(label or tonumber(v[1]), tonumber(v[1]))
  end
  return label or row.llab
end

-- What a batch of seals takes out of the indices of ROLLING and puts into those of READY: no seal looks at them, so they
-- follow at the end, one command an index.
local left = {ids = {}, stale = {}, instances = {}}
local entered = {}

local function leave_rolling(row)
  left.ids[#left.ids + 1] = row.id
  if row.stale > 0 then left.stale[#left.stale + 1] = row.id end
  local ids = left.instances[row.inst] or {}
  left.instances[row.inst] = ids
  ids[#ids + 1] = row.id
  uncount(row)
end

local function settle_indices()
  call_in_parts('ZREM', P .. 'rolling', left.ids)
  call_in_parts('ZREM', P .. 'rolling_labels', left.ids)
  call_in_parts('ZREM', P .. 'rolling_stale', left.stale)
  for instance, ids in pairs(left.instances) do call_in_parts('SREM', P .. 'inst:' .. instance, ids) end
  call_in_parts('ZADD', P .. 'ready', entered)
end

local SEAL_FIELDS = {'att', 'seal', 'llab', 'stale', 'inst', 'src'}

local function seal_one(i, id, attempt, digest, size, facts, samples, has_error, versions)
  local row = read_fields(id, SEAL_FIELDS)
  if not row then return {NO_PROMPT, '', ''} end
  if attempt ~= row.att then return {LOST, 'attempt', key_of(row.att)} end
  if row.seal then return {row.seal == digest and DUPLICATE or CONFLICT, '', ''} end
  if row.state > ROLLING then return {LOST, 'state', key_of(row.state)} end
  if samples ~= num('samples_per_prompt') then return {INVALID, 'samples', run.samples_per_prompt} end
  if size > num('max_group_bytes') then return {INVALID, 'bytes', run.max_group_bytes} end
  if has_error and num('error_policy') ~= POLICY_MASK then return {INVALID, 'outcomes', ''} end
  local label, problem = oldest_label(row, versions)
  if problem then return problem end
  -- Its lease expired and was reaped: nobody took the prompt, but its place may have been given away.
  if row.state == WAITING and math.min(admissible(), admissible_by_bytes()) < 1 then return {LOST, 'place', ''} end
  if row.state == ROLLING and admissible_by_bytes() < 1 then wake('p') end
  add('seal_seq', 1); add('payload_bytes', size)
  call('RENAME', P .. 'put:' .. i, P .. 'g:' .. id)
  if row.state == ROLLING then leave_rolling(row) else leave(row) end
  add('ready', 1)
  write(row, {state = READY, lab = label, sseq = num('seal_seq'), seal = digest, bytes = size, facts = facts})
  entered[#entered + 1] = label; entered[#entered + 1] = ready_member(row)
  wake('s')
  return {SEALED, '', ''}
end

-- seal(n times id, attempt, digest, bytes, facts, samples, has_error, versions) -> {status, what, value} each. The payload
-- of the i-th lies at P put:<i>, written by the transaction that this call is part of.
function C.seal()
  local out, refused = {}, {}
  for a = 3, #ARGV, 8 do
    local i = #out + 1
    out[i] = seal_one(i, ARGV[a], tonumber(ARGV[a + 1]), ARGV[a + 2], tonumber(ARGV[a + 3]), ARGV[a + 4],
                      tonumber(ARGV[a + 5]), ARGV[a + 6] == '1', ARGV[a + 7])
    if out[i][1] ~= SEALED then refused[#refused + 1] = P .. 'put:' .. i end
  end
  if #refused > 0 then call('UNLINK', unpack(refused)) end
  settle_indices()
  return {'', out}
end

-- ------------------------------------------------------------------------------------------------ steps leased

local function evict(step)
  local bound = step - 1 - num('max_staleness')
  for _, member in ipairs(call('ZRANGEBYSCORE', P .. 'ready', '-inf', '(' .. key_of(bound))) do
    local row = read(string.sub(member, 18))
    if num('on_stale') == ON_STALE_DROP then
      drop(row, STALE, 'label ' .. row.lab .. ' at step ' .. step)
    else
      add('stale_requeues', 1)
      requeue(row, {stale = row.stale + 1})
    end
  end
end

-- Labels of the rolling prompts that younger groups may not crowd out.
local function waited_labels()
  if num('on_stale') == ON_STALE_DROP then return {} end
  local all = num('on_stale') == ON_STALE_WAIT or num('stale_attempts') == 0
  local flat = call('ZRANGE', P .. (all and 'rolling_labels' or 'rolling_stale'), 0, -1, 'WITHSCORES')
  local labels = {}
  for i = 1, #flat, 2 do
    if all or tonumber(call('HGET', P .. 'p:' .. flat[i], 'stale') or 0) >= num('stale_attempts') then
      labels[#labels + 1] = tonumber(flat[i + 1])
    end
  end
  return labels
end

-- Hall's condition on deadlines: a younger group may overtake an older rolling one only into slack. `taken` is the flat
-- {member, label, ...} that the step would take. Answers how many prompts are waited for.
local function must_wait(step, taken)
  local waited = waited_labels()
  if #waited == 0 then return 0 end
  local size, bound = num('groups_per_step'), num('max_staleness')
  local first = step - bound - 1
  for k = 0, bound do
    local last, due, rolling = first + k, 0, 0
    for _, label in ipairs(waited) do if label >= first and label <= last then rolling = rolling + 1 end end
    if rolling > 0 then
      due = call('ZCOUNT', P .. 'ready', first, last)
      for i = 2, #taken, 2 do if tonumber(taken[i]) >= first and tonumber(taken[i]) <= last then due = due - 1 end end
      if due + rolling > k * size then return rolling end
    end
  end
  return 0
end

local function sources_done()
  return num('waiting') == 0 and num('rolling') == 0 and call('SCARD', P .. 'sources') > 0
    and call('SCARD', P .. 'sources_open') == 0
end

local STEP_FIELDS = {'att', 'facts', 'lab', 'age'}

local function rows_of(step)
  local rows = {}
  for k, id in ipairs(step_ids(step)) do
    rows[k] = assert(read_fields(id, STEP_FIELDS), id .. ' stands in a step and has no row')
  end
  return rows
end

local function describe_step(step, rows, repeated)
  local groups = {}
  for k, row in ipairs(rows) do groups[k] = {row.id, row.att, row.facts or '', row.age, row.bytes} end
  local bound = tonumber(call('HGET', P .. 'step:' .. key_of(step), 'bound') or 0)
  return {'', 1, groups, repeated, bound, num('pub_label'), checkpoint_wanted()}
end

local function pending(why, needed, waited)
  return {'', 0, why, needed, num('ready'), num('rolling'), num('waiting'), waited, next_expiry(), checkpoint_wanted(),
          num('pub_label')}
end

-- Gives the taken groups to a step; answers their rows. What removes goes first: a full Redis refuses what grows, unless
-- something else was written before.
local function assign(step, taken)
  local name, bound, rows, ids, members = key_of(step), num('max_staleness'), {}, {}, {}
  for i = 1, #taken, 2 do members[#members + 1] = taken[i] end
  call_in_parts('ZREM', P .. 'ready', members)
  for k, member in ipairs(members) do
    local row = read_fields(string.sub(member, 18), STEP_FIELDS)
    rows[k], ids[k] = row, row.id
    uncount(row)
    add('assigned', 1)
    local age = math.max(0, step - 1 - row.lab)
    write(row, {state = ASSIGNED, step = step, pos = k - 1, age = age, bound = bound})
    if age > num('max_age') then set('max_age', age) end
  end
  call_in_parts('RPUSH', P .. 'ids:' .. name, ids)
  call('HSET', P .. 'sizes', name, #ids)
  call('HSET', P .. 'step:' .. name, 'bound', bound, 'resumes', 0)
  if step > num('leased') then set('leased', step) end
  return rows
end

-- The first leased step behind this one: what is kept behind a gap. 0: there is none.
local function kept_behind(step)
  for kept = step + 1, num('leased') do
    if step_size(kept) > 0 then return kept end
  end
  return 0
end

-- Gives the groups of a kept step to an earlier one, which nothing else can fill any more; answers their rows.
local function close_gap(kept, step)
  local from, to, rows = key_of(kept), key_of(step), rows_of(kept)
  for _, row in ipairs(rows) do write(row, {step = step, age = math.max(0, step - 1 - row.lab)}) end
  for _, key in ipairs({'ids:', 'step:'}) do call('RENAME', P .. key .. from, P .. key .. to) end
  call('HDEL', P .. 'sizes', from)
  call('HSET', P .. 'sizes', to, #rows)
  while step_size(num('leased')) == 0 do add('leased', -1) end
  return rows
end

local function drop_tail()
  for _, member in ipairs(call('ZRANGE', P .. 'ready', 0, -1)) do drop(read(string.sub(member, 18)), TAIL, 'sources closed') end
end

-- lease_step(term, step) -> 1, groups, repeated, bound, p, checkpoint_wanted  |  0, why, needed, ready, rolling, waiting,
--                           waited for, next expiry, checkpoint_wanted, p
function C.lease_step()
  local term, step = tonumber(ARGV[3]), tonumber(ARGV[4])
  local refused = fence_stated(term)
  if refused then return refused end
  local committed = num('committed')
  if step_size(step) > 0 then return describe_step(step, rows_of(step), 1) end
  if step > committed + 2 then return fail('STEP_AHEAD', 'step', key_of(step), 'committed', key_of(committed)) end
  if step == committed + 2 and step_size(step - 1) == 0 then
    return fail('STEP_SKIPPED', 'step', key_of(step), 'committed', key_of(committed))
  end
  reap()
  evict(step)
  local size = num('groups_per_step')
  if num('ready') < size then
    if not sources_done() then return pending('ready', size, 0) end
    if num('tail') == TAIL_DROP then drop_tail() end
    if num('ready') == 0 then
      local kept = kept_behind(step)
      if kept == 0 then return fail('FINISHED', 'step', key_of(step)) end
      return describe_step(step, close_gap(kept, step), 0)
    end
    size = num('ready')
  end
  local taken = call('ZRANGE', P .. 'ready', 0, size - 1, 'WITHSCORES')
  local waited = must_wait(step, taken)
  if waited > 0 then return pending('older', size, waited) end
  return describe_step(step, assign(step, taken), 0)
end

-- ------------------------------------------------------------------------------------------------ steps committed

local COMMIT_FIELDS = {'step', 'pos'}

-- commit(term, step, n, ids..., m, (id, reason)...) -> committed, checkpoint_wanted, repeated
function C.commit()
  local term, step, n = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
  local dropped = parse_dropped(7 + n, tonumber(ARGV[6 + n]))
  local refused = fence_stated(term)
  if refused then return refused end
  local committed, ids = num('committed'), step_ids(step)
  if step > committed + 1 then return fail('STEP_ORDER', 'step', key_of(step), 'committed', key_of(committed)) end
  if #ids == 0 then return fail('STEP_NOT_LEASED', 'step', key_of(step)) end
  if #ids ~= n then return fail('STEP_IDS', 'step', key_of(step), 'expected', #ids, 'given', n) end
  local rows = {}
  for k, id in ipairs(ids) do
    if ARGV[5 + k] ~= id then return fail('STEP_IDS', 'position', k - 1, 'expected', id, 'given', ARGV[5 + k]) end
    rows[k] = read_fields(id, COMMIT_FIELDS)
    if rows[k].state ~= ASSIGNED then rows[k] = read(id) end
    if step <= committed and (rows[k].state == DROPPED and rows[k].why or nil) ~= dropped[id] then
      return fail('STEP_DROPPED', 'step', key_of(step), 'prompt_id', id)
    end
  end
  if step <= committed then return {'', committed, checkpoint_wanted(), 1} end
  for k, row in ipairs(rows) do settle(row, step, k - 1, dropped[row.id]) end
  call('HSET', P .. 'step:' .. key_of(step), 'resumes', 0)
  set('committed', step)
  return {'', step, checkpoint_wanted(), 0}
end

-- Frees what trained groups hold: payloads and facts. A row without `bytes` holds none.
local function free_payloads(ids)
  local keys = {}
  for _, id in ipairs(ids) do
    local row = read_fields(id, {})
    if row.bytes > 0 then
      keys[#keys + 1] = P .. 'g:' .. id
      add('payload_bytes', -row.bytes)
      if run.audit and row.seq <= num('audit') then call('HINCRBY', P .. 'audit', 'payload_bytes', key_of(-row.bytes)) end
    end
    call('HDEL', P .. 'p:' .. id, 'bytes', 'facts')
  end
  for from = 1, #keys, 1000 do call('UNLINK', unpack(keys, from, math.min(#keys, from + 999))) end
  if #keys > 0 then wake('p') end
  return #keys
end

-- trim(term, step) -> trimmed, freed, 1 if there is more to do
function C.trim()
  local term, step = tonumber(ARGV[3]), tonumber(ARGV[4])
  local refused = fence_stated(term)
  if refused then return refused end
  if step > num('committed') then return fail('TRIM_AHEAD', 'step', key_of(step), 'committed', run.committed or '0') end
  local freed, seen, at = 0, 0, num('trimmed')
  while at < step and seen < TRIM_LIMIT do
    at = at + 1
    local ids = step_ids(at)
    freed, seen = freed + free_payloads(ids), seen + #ids
    call('ZREM', P .. 'holes', key_of(at))
  end
  if at > num('trimmed') then set('trimmed', at) end
  return {'', num('trimmed'), freed, at < step and 1 or 0}
end

-- ------------------------------------------------------------------------------------------------ resume

local function open_term(term)
  for _, version in ipairs(call('SMEMBERS', P .. 'reserved')) do
    if tonumber(call('HGET', P .. 'v:' .. version, 'term')) < term then
      call('HSET', P .. 'v:' .. version, 'state', VOID)
      call('SREM', P .. 'reserved', version)
    end
  end
  call('DEL', P .. 'reservations')
  set('term', term)
  wake('s')
end

local function standing(next_step, poison)
  return {'', num('term'), num('committed'), num('pub_version') > 0 and num('pub_label') or -1, num('pub_version'),
          num('trimmed'), next_step, poison}
end

-- resume_open() -> standing
function C.resume_open()
  open_term(math.max(num('term') + 1, now()))
  return standing(0, 0)
end

local function parse_manifest(at)
  local steps, n = {}, tonumber(ARGV[at])
  at = at + 1
  for _ = 1, n do
    local step, size = tonumber(ARGV[at]), tonumber(ARGV[at + 1])
    local ids = {}
    for k = 1, size do ids[k] = ARGV[at + 1 + k] end
    at = at + 2 + size
    local m = tonumber(ARGV[at])
    steps[step] = {ids = ids, dropped = parse_dropped(at + 1, m)}
    at = at + 1 + 2 * m
  end
  return steps
end

local function mismatch(step, id) return fail('MANIFEST_MISMATCH', 'step', key_of(step), 'prompt_id', id) end

-- What the ledger holds as committed must be what the manifest says; what it lacks must be in the manifest and must not
-- stand elsewhere.
local function check_manifest(manifest, checkpoint)
  local committed, seen = num('committed'), {}
  for step, m in pairs(manifest) do
    if step <= math.min(committed, checkpoint) then
      local ids = step_ids(step)
      for k = 1, math.max(#ids, #m.ids) do if ids[k] ~= m.ids[k] then return mismatch(step, m.ids[k] or ids[k]) end end
    end
  end
  for step = committed + 1, checkpoint do
    local m = manifest[step]
    if not m or #m.ids == 0 then
      return fail('MANIFEST_LACKS', 'step', key_of(step), 'committed', key_of(committed), 'checkpoint', key_of(checkpoint))
    end
    for _, id in ipairs(m.ids) do
      local row = read(id)
      if seen[id] or (row and row.state >= ASSIGNED and row.step > 0 and (row.step <= committed or row.step > checkpoint)) then
        return mismatch(step, id)
      end
      seen[id] = true
    end
  end
  return nil
end

local function tombstone(id)
  add('seq', 1); add('accepted', 1); add('waiting', 1)
  call('HSET', P .. 'p:' .. id, 'state', WAITING, 'att', 0, 'dig', '', 'seq', num('seq'), 'src', '', 'tomb', 1)
  call('ZADD', P .. 'index', num('seq'), id)
  return read(id)
end

-- Makes one step TRAINED from a manifest.
local function restate_step(step, m)
  local name, listed, hole = key_of(step), {}, false
  for _, id in ipairs(m.ids) do listed[id] = true end
  for _, id in ipairs(step_ids(step)) do
    local row = not listed[id] and read(id)
    if row and row.state == ASSIGNED and row.step == step then
      to_ready(row, {})
      erase(row, 'step', 'pos', 'age', 'bound')
    end
  end
  call('DEL', P .. 'ids:' .. name)
  for k, id in ipairs(m.ids) do
    local row = read(id) or tombstone(id)
    settle(row, step, k - 1, m.dropped[id])
    erase(row, 'inst')
    hole = hole or row.bytes == 0
    call('RPUSH', P .. 'ids:' .. name, id)
  end
  if hole then call('ZADD', P .. 'holes', step, name) end
  call('HSET', P .. 'sizes', name, #m.ids)
  call('HSETNX', P .. 'step:' .. name, 'bound', num('max_staleness'))
end

local function unlease_gap(step, on_gap)
  local name = key_of(step)
  for _, id in ipairs(step_ids(step)) do
    local row = read(id)
    if on_gap == GAP_DROP or row.tomb then
      drop(row, GAP, 'step ' .. name .. ' has no payload')
      erase(row, 'step', 'pos', 'age', 'bound')
    else
      requeue(row, {})
    end
  end
  call('DEL', P .. 'ids:' .. name, P .. 'step:' .. name)
  call('HDEL', P .. 'sizes', name)
  call('ZREM', P .. 'holes', name)
end

-- Steps after the checkpoint that were committed are ASSIGNED again; those without payloads are handled by on_gap.
local function rewind(checkpoint, on_gap)
  for step = checkpoint + 1, num('committed') do
    for k, id in ipairs(step_ids(step)) do
      local row = read(id)
      leave(row)
      add('assigned', 1)
      write(row, {state = ASSIGNED, pos = k - 1})
      erase(row, 'why')
    end
  end
  local gaps = call('ZRANGEBYSCORE', P .. 'holes', '(' .. key_of(checkpoint), '+inf')
  for step = checkpoint + 1, num('trimmed') do gaps[#gaps + 1] = key_of(step) end
  for _, step in ipairs(gaps) do unlease_gap(tonumber(step), on_gap) end
  if num('trimmed') > checkpoint then set('trimmed', checkpoint) end
  set('committed', checkpoint)
  while num('leased') > checkpoint and step_size(num('leased')) == 0 do add('leased', -1) end
end

-- The step that was being trained when the consumer went away; how often that happened since its last commit.
local function count_resume(step)
  if step_size(step) == 0 then return 0 end
  return call('HINCRBY', P .. 'step:' .. key_of(step), 'resumes', 1) >= POISON_RESUMES and step or 0
end

-- resume_state(term, checkpoint, on_gap, n, then n times step, size, ids..., m, (id, reason)...) -> standing
function C.resume_state()
  local term, checkpoint, on_gap = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
  if term < num('term') then return fence(term) end
  local again = num('stated_term') == term
  if again and checkpoint < num('committed') then return standing(num('committed') + 1, 0) end
  local manifest = parse_manifest(6)
  local refused = check_manifest(manifest, checkpoint)
  if refused then return refused end
  local gap = num('trimmed') > checkpoint or #call('ZRANGEBYSCORE', P .. 'holes', '(' .. key_of(checkpoint), '+inf') > 0
  if gap and on_gap == GAP_FAIL then
    return fail('GAP', 'checkpoint', key_of(checkpoint), 'trimmed', key_of(num('trimmed')))
  end
  if term > num('term') then open_term(term) end
  set('stated_term', term)
  local suspect = num('committed') + 1
  for step = num('committed') + 1, checkpoint do restate_step(step, manifest[step]) end
  if checkpoint > num('committed') then set('committed', checkpoint) end
  if checkpoint > num('leased') then set('leased', checkpoint) end
  rewind(checkpoint, on_gap)
  local poison = 0
  if not again and suspect > checkpoint then poison = count_resume(suspect) end
  wake('p'); wake('s')
  return standing(checkpoint + 1, poison)
end

-- ------------------------------------------------------------------------------------------------ weights

local function version_row(version)
  local v = call('HMGET', P .. 'v:' .. key_of(version), 'label', 'state', 'term', 'members', 'at')
  if not v[1] then return nil end
  return {version, tonumber(v[1]), tonumber(v[2]), tonumber(v[3]), v[4] or '[]', tonumber(v[5] or 0)}
end

-- reserve(term, step, attempt, at_least) -> version
function C.reserve()
  local term, step, at_least = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[6])
  local refused = fence(term)
  if refused then return refused end
  local name = ARGV[3] .. ':' .. step .. ':' .. ARGV[5]
  local known = tonumber(call('HGET', P .. 'reservations', name) or 0)
  if known > 0 and known >= at_least then return {'', known} end
  local version = math.max(num('next_version'), at_least)
  set('next_version', version + 1)
  call('HSET', P .. 'reservations', name, key_of(version))
  call('HSET', P .. 'v:' .. key_of(version), 'label', step, 'state', RESERVED, 'term', ARGV[3])
  call('SADD', P .. 'reserved', key_of(version))
  return {'', version}
end

local function check_publish(version, label, older)
  local known = version_row(version)
  if not known and version < num('next_version') then return fail('UNKNOWN_VERSION', 'version', key_of(version)) end
  if known and known[3] == VOID then return fail('VERSION_VOID', 'version', key_of(version)) end
  if known and known[2] ~= label then
    return fail('LABEL_MISMATCH', 'version', key_of(version), 'reserved', key_of(known[2]), 'given', key_of(label))
  end
  local newest, p = num('pub_version'), num('pub_label')
  if version > newest and newest > 0 and label < p and not older then
    return fail('OLDER_LABEL', 'label', key_of(label), 'published', key_of(p))
  end
  if version < newest and label > p then return fail('OLDER_VERSION', 'version', key_of(version), 'newest', key_of(newest)) end
  return nil
end

-- publish(term, version, label, members_json, allow_older_label) -> version row. A number that is unknown and above all
-- reserved ones is a restatement after Redis forgot. A number below the newest is recorded and changes nothing else.
function C.publish()
  local term, version, label = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5])
  local refused = fence(term)
  if refused then return refused end
  local known = version_row(version)
  if known and known[3] == PUBLISHED and known[2] == label then return {'', known} end
  refused = check_publish(version, label, ARGV[7] == '1')
  if refused then return refused end
  call('HSET', P .. 'v:' .. key_of(version), 'label', label, 'state', PUBLISHED, 'term', ARGV[3], 'members', ARGV[6], 'at', now())
  call('SREM', P .. 'reserved', key_of(version))
  if version >= num('next_version') then set('next_version', version + 1) end
  if version > num('pub_version') then
    set('pub_version', version); set('pub_label', label)
    wake('v'); wake('p')
  end
  return {'', version_row(version)}
end

-- version(number or 0) -> version row
function C.version()
  local version = tonumber(ARGV[3])
  if version == 0 then version = num('pub_version') end
  local row = version > 0 and version_row(version)
  if not row then return fail('NO_VERSION', 'version', ARGV[3]) end
  return {'', row}
end

-- router(id, term, ttl_ms) -> term
function C.router()
  local id, term, ttl = ARGV[3], tonumber(ARGV[4]), tonumber(ARGV[5])
  local v = call('HMGET', P .. 'router', 'id', 'term', 'expiry')
  local holder, newest, expiry = v[1] or '', tonumber(v[2] or 0), tonumber(v[3] or 0)
  if term > 0 and term < newest then return fail('STALE_TERM', 'term', key_of(term), 'newest', key_of(newest)) end
  if holder ~= id or term > newest then
    if holder ~= id and expiry > now() then return fail('ROUTER_HELD', 'holder', holder, 'for_ms', key_of(expiry - now())) end
    newest = math.max(newest + 1, term, now())
  end
  call('HSET', P .. 'router', 'id', id, 'term', newest, 'expiry', now() + ttl)
  return {'', newest}
end

-- ------------------------------------------------------------------------------------------------ accounts

-- stats() -> the run's hash, admissible, credits, open sources
function C.stats()
  reap()
  finish(); dirty, topics = {}, {}
  return {'', call('HGETALL', KEYS[1]), math.max(0, math.min(admissible(), admissible_by_bytes())), credits(''),
          call('SCARD', P .. 'sources_open'), next_expiry()}
end

-- rows(ids...) -> one array of FIELDS a prompt, empty where unknown
function C.rows()
  local out = {}
  for i = 3, #ARGV do
    local v = call('HMGET', P .. 'p:' .. ARGV[i], unpack(FIELDS))
    out[#out + 1] = v[1] and v or {}
  end
  return {'', out}
end

local AUDIT_FIELDS = {'state', 'why', 'step', 'bytes', 'age', 'bound', 'sseq', 'pos'}
local problems

local function problem(text) if #problems < 100 then problems[#problems + 1] = text end end

-- Looks at one row, and at the indices that should hold it.
local function audit_row(id, tally)
  local v = call('HMGET', P .. 'p:' .. id, unpack(AUDIT_FIELDS))
  if not v[1] then tally.lost = tally.lost + 1; return problem('prompt ' .. id .. ' was accepted and has no row') end
  local state, bytes = tonumber(v[1]), tonumber(v[4] or 0)
  local counter = counter_of(state, tonumber(v[2] or 0))
  tally.counts[counter] = (tally.counts[counter] or 0) + 1
  tally.counts.payload_bytes = (tally.counts.payload_bytes or 0) + bytes
  if v[3] and call('LINDEX', P .. 'ids:' .. v[3], v[8] or -1) ~= id then
    problem(id .. ' says that it stands at step ' .. v[3] .. ', the step says otherwise')
  end
  if state == WAITING and not call('ZSCORE', P .. 'waiting', id) then problem(id .. ' is WAITING and not in the queue') end
  if state == ROLLING and not call('ZSCORE', P .. 'rolling', id) then problem(id .. ' is ROLLING without an expiry') end
  if state == READY and not call('ZSCORE', P .. 'ready', string.format('%016.0f', v[7]) .. ':' .. id) then
    problem(id .. ' is READY and no step can take it')
  end
  if (state == READY or state == ASSIGNED) and bytes == 0 then problem(id .. ' has no payload') end
  if bytes > 0 and call('STRLEN', P .. 'g:' .. id) ~= bytes then problem('payload of ' .. id .. ' is not as long as recorded') end
  local age = tonumber(v[5] or 0)
  if state == TRAINED then
    if age > tonumber(v[6] or age) then tally.beyond = tally.beyond + 1 end
    tally.max_age = math.max(tally.max_age, age)
  end
end

-- What was counted row by row against the counters, once every row was visited.
local function audit_sums()
  local flat, counted = call('HGETALL', P .. 'audit'), {}
  for i = 1, #flat, 2 do counted[flat[i]] = tonumber(flat[i + 1]) end
  local known = call('ZCARD', P .. 'index')
  if num('accepted') ~= known then problem('accepted ' .. num('accepted') .. ', indexed ' .. known) end
  local names, live = {'payload_bytes'}, {}
  for _, name in ipairs(COUNTER) do names[#names + 1] = name end
  for name in pairs(counted) do if string.sub(name, 1, 8) == 'dropped:' then names[#names + 1] = name end end
  for name in pairs(run) do
    if string.sub(name, 1, 8) == 'dropped:' and not counted[name] then names[#names + 1] = name end
  end
  for _, name in ipairs(names) do
    if num(name) ~= (counted[name] or 0) then
      problem(name .. ' counts ' .. num(name) .. ', rows say ' .. (counted[name] or 0))
    end
    if string.sub(name, 1, 8) == 'dropped:' and num(name) > 0 then
      live[#live + 1] = tonumber(string.sub(name, 9)); live[#live + 1] = num(name)
    end
  end
  for _, name in ipairs({'waiting', 'rolling', 'ready'}) do
    if call('ZCARD', P .. name) ~= num(name) then problem('queue ' .. name .. ' does not hold its count') end
  end
  return live
end

local function end_audit()
  call('DEL', P .. 'audit')
  call('HDEL', KEYS[1], 'audit')
  run.audit, dirty.audit = nil, nil
end

-- audit_rows(token, begins, limit) -> done, lost, beyond bound, max staleness, problems, and once it is done:
--   accepted, trained, in flight, {why, count, ...}
-- Visits the next rows in the order of their acceptance. Between two calls anything may happen: `write` keeps what was
-- counted true, so that the sums of the last call are those of one instant.
function C.audit_rows()
  local token, begins, limit = ARGV[3], ARGV[4] == '1', tonumber(ARGV[5])
  local held = call('HMGET', P .. 'audit', 'token', 'at')
  if begins then
    if held[1] and now() - tonumber(held[2]) < AUDIT_IDLE_MS then return fail('AUDIT_RUNS') end
    end_audit()
    call('HSET', P .. 'audit', 'token', token)
    set('audit', 0)
  elseif held[1] ~= token then
    return fail('AUDIT_REPLACED')
  end
  call('HDEL', P .. 'audit', 'at')  -- a full Redis refuses what grows, unless something else was written before
  call('HSET', P .. 'audit', 'at', key_of(now()))
  problems = {}
  local tally = {counts = {}, lost = 0, beyond = 0, max_age = 0}
  local found = call('ZRANGEBYSCORE', P .. 'index', '(' .. key_of(num('audit')), '+inf', 'WITHSCORES', 'LIMIT', 0, limit)
  for i = 1, #found, 2 do audit_row(found[i], tally) end
  if #found > 0 then set('audit', key_of(tonumber(found[#found]))) end
  for name, n in pairs(tally.counts) do call('HINCRBY', P .. 'audit', name, key_of(n)) end
  if #found == 2 * limit then return {'', 0, tally.lost, tally.beyond, tally.max_age, problems} end
  local why = audit_sums()
  end_audit()
  return {'', 1, tally.lost, tally.beyond, tally.max_age, problems, num('accepted'), num('trained'),
          num('waiting') + num('rolling') + num('ready') + num('assigned'), why}
end

-- audit_end(token): gives an audit up.
function C.audit_end()
  if call('HGET', P .. 'audit', 'token') == ARGV[3] then end_audit() end
  return {''}
end

-- One place of a step's list against the row that stands there; true for a row that is trained in another place.
local function audit_place(id, step, pos)
  local v = call('HMGET', P .. 'p:' .. id, 'state', 'step', 'pos')
  local state, committed = tonumber(v[1] or 0), step <= num('committed')
  if tonumber(v[2] or 0) ~= step or tonumber(v[3] or -1) ~= pos then
    problem(id .. ' stands at step ' .. step .. ' position ' .. pos .. ', its row says otherwise')
    return state == TRAINED and committed
  elseif committed and state ~= TRAINED and state ~= DROPPED then
    problem(id .. ' of committed step ' .. step .. ' is not TRAINED')
  elseif not committed and state ~= ASSIGNED then
    problem(id .. ' of leased step ' .. step .. ' is not ASSIGNED')
  end
end

-- audit_steps(step, pos, limit) -> the step and the position to go on from (0: all were visited), twice, problems,
--   committed, next version
function C.audit_steps()
  local step, pos, left, twice = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), 0
  problems = {}
  while left > 0 and step <= num('leased') do
    local key = P .. 'ids:' .. key_of(step)
    local n = call('LLEN', key)
    if pos == 0 and n ~= step_size(step) then
      problem('step ' .. step .. ' has ' .. n .. ' groups, leased with ' .. step_size(step))
    end
    if n == 0 and step <= num('committed') then problem('step ' .. step .. ' is committed and empty') end
    local ids = call('LRANGE', key, pos, pos + left - 1)
    for k, id in ipairs(ids) do if audit_place(id, step, pos + k - 1) then twice = twice + 1 end end
    pos, left = pos + #ids, left - math.max(1, #ids)
    if pos >= n then step, pos = step + 1, 0 end
  end
  return {'', step <= num('leased') and step or 0, pos, twice, problems, num('committed'), num('next_version')}
end

-- ------------------------------------------------------------------------------------------------ dispatch

local command = C[ARGV[1]]
if not command then return fail('UNKNOWN_COMMAND', 'command', ARGV[1]) end
if ARGV[1] ~= 'create' then
  if not load_run() then return fail('UNKNOWN_RUN') end
  if run.schema ~= SCHEMA then return fail('SCHEMA', 'ledger', run.schema, 'build', SCHEMA) end
end
local reply = command()
finish()
return reply
