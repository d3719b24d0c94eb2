--- CUDA streams and events.
-- @module cuflash.stream

local ffi = require "ffi"
local native = require "cuflash.native"
local checks = require "cuflash.checks"
local dtype = require "cuflash.dtype"
local errors = require "cuflash.errors"

local C = native.C

local Stream, Event = {}, {}
Stream.__index = Stream
Event.__index = Event

local stream = { Stream = Stream, Event = Event }

-- Both are tables around a handle, which is destroyed with them. The finalizer sits on the box, a cdata.
local function make(name, class, device, kind, create, destroy)
  device = checks.cuda_device(name, "device", device)
  local box = ffi.new(kind .. "[1]")
  native.call(name, create, device, box)
  return setmetatable({ device = device, box = ffi.gc(box, function(b) destroy(device, b[0]) end) }, class)
end

local function check(name, argument, value, class)
  if getmetatable(value) == class then return value end
  local what = class == Stream and "a stream" or "an event"
  return checks.fail(name, argument, argument == "self" and what .. " (methods are called with a colon)" or what, value)
end

--- A new stream. Work on different streams may run at the same time; cuda.with_stream puts work on it.
-- @tparam[opt="cuda"] string device
-- @treturn Stream
-- @function cuda.stream
function stream.stream(device)
  return make("cuda.stream", Stream, device, "cudaStream_t", C.cuflash_stream_create, C.cuflash_stream_destroy)
end

--- Calls a function whose work goes to a stream: all CUDA work of this thread does until it returns or raises.
-- @tparam Stream stream
-- @tparam function f
-- @param ... its arguments
-- @return what it returns
-- @function cuda.with_stream
function stream.with_stream(on, f, ...)
  check("cuda.with_stream", "stream", on, Stream)
  if type(f) ~= "function" then checks.fail("cuda.with_stream", "f", "a function", f) end
  local before = C.cuflash_set_stream(on.box[0])
  local function finish(ok, ...)
    C.cuflash_set_stream(before)
    if not ok then error((...), 0) end
    return ...
  end
  return finish(pcall(f, ...))
end

--- The stream as CUDA knows it: a cudaStream_t, which the stream must outlive.
-- @treturn cdata
-- @function stream:handle
function Stream:handle()
  return check("handle", "self", self, Stream).box[0]
end

--- Waits until the work on the stream is done.
-- @treturn Stream self
-- @function stream:synchronize
function Stream:synchronize()
  check("synchronize", "self", self, Stream)
  native.call("synchronize", C.cuflash_stream_synchronize, self.device, self.box[0])
  return self
end

--- Lets what is queued on the stream from now on wait for an event, without waiting here.
-- @tparam Event event
-- @treturn Stream self
-- @function stream:wait
function Stream:wait(event)
  check("wait", "self", self, Stream)
  check("wait", "event", event, Event)
  native.call("wait", C.cuflash_stream_wait_event, self.device, self.box[0], event.box[0])
  return self
end

function Stream:__tostring() return ("[cf.Stream %s]"):format(dtype.device_name(self.device)) end

--- A new event: a point in a stream's work, to wait for and to measure times between.
-- @tparam[opt="cuda"] string device
-- @treturn Event
-- @function cuda.event
function stream.event(device)
  return make("cuda.event", Event, device, "cudaEvent_t", C.cuflash_event_create, C.cuflash_event_destroy)
end

--- Puts the event behind what is queued on a stream so far.
-- @tparam[opt] Stream stream that of with_stream, or the default one
-- @treturn Event self
-- @function event:record
function Event:record(on)
  check("record", "self", self, Event)
  if on ~= nil then check("record", "stream", on, Stream) end
  native.call("record", C.cuflash_event_record, self.device, self.box[0], on and on.box[0] or nil)
  self.recorded = true
  return self
end

--- Waits until the work before the event is done.
-- @treturn Event self
-- @function event:synchronize
function Event:synchronize()
  check("synchronize", "self", self, Event)
  native.call("synchronize", C.cuflash_event_synchronize, self.device, self.box[0])
  return self
end

--- Milliseconds of device time from this event to a later one; waits for it. Both must have been recorded.
-- @tparam Event later
-- @treturn number
-- @function event:elapsed
function Event:elapsed(later)
  check("elapsed", "self", self, Event)
  check("elapsed", "later", later, Event)
  for argument, event in pairs { self = self, later = later } do
    if not event.recorded then errors.raise("elapsed: argument '%s': the event was not recorded yet", argument) end
  end
  later:synchronize()
  local milliseconds = ffi.new "float[1]"
  native.call("elapsed", C.cuflash_event_elapsed, self.device, self.box[0], later.box[0], milliseconds)
  return milliseconds[0]
end

function Event:__tostring() return ("[cf.Event %s]"):format(dtype.device_name(self.device)) end

return stream
