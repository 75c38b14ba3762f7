// The NRI plugin of tests/nri: it writes down every event and answers by a script.
//
//	nri-plugin -socket PATH -idx NN -name NAME -log FILE [-script FILE] [-once]
//	nri-plugin -socket PATH -call METHOD < REQUEST (a call of CRI itself: call.go)
//
// Started by the runtime (descriptor 3), it takes {"log": FILE, "script": FILE} from its configuration. The script is
// JSON, read again at every event: {EVENT: {"container": NAME, "error": TEXT, "delay_ms": N, "exit": true,
// "adjust": ContainerAdjustment, "update": [ContainerUpdate], "evict": [ContainerEviction], "ls": COMMAND}}; with
// "if_updated": ID the error is only given where a creation updates that container; the key "events" names what to
// subscribe to. Lines on stdin are UpdateContainersRequests, sent unasked; the outcome is an event "Updated" of the log.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

type answer struct {
	Container string            `json:"container"`
	Error     string            `json:"error"`
	DelayMs   int               `json:"delay_ms"`
	Exit      bool              `json:"exit"`
	Adjust    json.RawMessage   `json:"adjust"`
	Update    []json.RawMessage `json:"update"`
	Evict     []json.RawMessage `json:"evict"`
	IfUpdated string            `json:"if_updated"`
	Ls        string            `json:"ls"`
}

type plugin struct {
	lock   sync.Mutex
	log    string
	script string
	stub   stub.Stub
	// Evictions of the message that goes out next: the stub has no place for them.
	evict []*api.ContainerEviction
}

func fail(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "nri-plugin:", err)
		os.Exit(1)
	}
}

func raw(message proto.Message) json.RawMessage {
	if message == nil || !message.ProtoReflect().IsValid() {
		return json.RawMessage("null")
	}
	text, err := protojson.MarshalOptions{UseProtoNames: true}.Marshal(message)
	fail(err)
	return text
}

func (p *plugin) write(entry map[string]any) {
	p.lock.Lock()
	defer p.lock.Unlock()
	line, err := json.Marshal(entry)
	fail(err)
	file, err := os.OpenFile(p.log, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	fail(err)
	_, err = file.Write(append(line, '\n'))
	fail(err)
	fail(file.Close())
}

func (p *plugin) read() map[string]json.RawMessage {
	all := map[string]json.RawMessage{}
	if text, err := os.ReadFile(p.script); err == nil {
		if err := json.Unmarshal(text, &all); err != nil {
			fmt.Fprintln(os.Stderr, "nri-plugin: script:", err)
		}
	}
	return all
}

// event notes what came and says what to answer.
func (p *plugin) event(name string, pod *api.PodSandbox, container *api.Container, more map[string]any) (answer, error) {
	entry := map[string]any{"event": name}
	for key, value := range more {
		entry[key] = value
	}
	if pod != nil {
		entry["pod"] = raw(pod)
	}
	if container != nil {
		entry["container"] = raw(container)
	}
	found := answer{}
	if text, ok := p.read()[name]; ok {
		fail(json.Unmarshal(text, &found))
	}
	if found.Container != "" && found.Container != container.GetName() {
		found = answer{}
	}
	if found.Ls != "" {
		out, err := exec.Command("sh", "-c", found.Ls).CombinedOutput()
		entry["ls"] = strings.Fields(string(out))
		if err != nil {
			entry["ls_error"] = err.Error()
		}
	}
	p.write(entry)
	if found.Exit {
		os.Exit(3)
	}
	if found.DelayMs > 0 {
		time.Sleep(time.Duration(found.DelayMs) * time.Millisecond)
		p.write(map[string]any{"event": "Answers"})
	}
	if found.Error != "" {
		return found, errors.New(found.Error)
	}
	return found, nil
}

func updates(given []json.RawMessage) []*api.ContainerUpdate {
	var all []*api.ContainerUpdate
	for _, text := range given {
		update := &api.ContainerUpdate{}
		fail(protojson.Unmarshal(text, update))
		all = append(all, update)
	}
	return all
}

func (p *plugin) evicts(given []json.RawMessage) {
	p.lock.Lock()
	defer p.lock.Unlock()
	for _, text := range given {
		eviction := &api.ContainerEviction{}
		fail(protojson.Unmarshal(text, eviction))
		p.evict = append(p.evict, eviction)
	}
}

func (p *plugin) evicted() []*api.ContainerEviction {
	p.lock.Lock()
	defer p.lock.Unlock()
	taken := p.evict
	p.evict = nil
	return taken
}

// answers puts evictions into what the stub answers.
func (p *plugin) answers(ctx context.Context, take ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	answer, err := method(ctx, take)
	switch answer := answer.(type) {
	case *api.CreateContainerResponse:
		answer.Evict = p.evicted()
	case *api.UpdateContainerResponse:
		answer.Evict = p.evicted()
	}
	return answer, err
}

// asks puts evictions into what the stub asks for.
func (p *plugin) asks(ctx context.Context, request *ttrpc.Request, answer *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
	if request.Method == "UpdateContainers" {
		asked := &api.UpdateContainersRequest{}
		fail(proto.Unmarshal(request.Payload, asked))
		asked.Evict = p.evicted()
		payload, err := proto.Marshal(asked)
		fail(err)
		request.Payload = payload
	}
	return call(ctx, request, answer)
}

func (p *plugin) Configure(_ context.Context, config, runtime, version string) (api.EventMask, error) {
	if config != "" && p.log == "" {
		given := struct{ Log, Script string }{}
		fail(json.Unmarshal([]byte(config), &given))
		p.log, p.script = given.Log, given.Script
	}
	p.write(map[string]any{"event": "Configure", "config": config, "runtime": runtime, "version": version, "pid": os.Getpid(),
		"registration_ms": p.stub.RegistrationTimeout().Milliseconds(), "request_ms": p.stub.RequestTimeout().Milliseconds()})
	if text, ok := p.read()["events"]; ok {
		var names string
		fail(json.Unmarshal(text, &names))
		return api.ParseEventMask(names)
	}
	return 0, nil
}

func (p *plugin) Synchronize(_ context.Context, pods []*api.PodSandbox, containers []*api.Container) ([]*api.ContainerUpdate, error) {
	listed := func(n int, of func(int) proto.Message) []json.RawMessage {
		all := []json.RawMessage{}
		for i := range n {
			all = append(all, raw(of(i)))
		}
		return all
	}
	found, err := p.event("Synchronize", nil, nil, map[string]any{
		"pods":       listed(len(pods), func(i int) proto.Message { return pods[i] }),
		"containers": listed(len(containers), func(i int) proto.Message { return containers[i] }),
	})
	return updates(found.Update), err
}

func (p *plugin) Shutdown(context.Context) {
	p.write(map[string]any{"event": "Shutdown"})
}

func (p *plugin) RunPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("RunPodSandbox", pod, nil, nil)
	return err
}

func (p *plugin) UpdatePodSandbox(_ context.Context, pod *api.PodSandbox, overhead, resources *api.LinuxResources) error {
	_, err := p.event("UpdatePodSandbox", pod, nil, map[string]any{"overhead": raw(overhead), "resources": raw(resources)})
	return err
}

func (p *plugin) PostUpdatePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("PostUpdatePodSandbox", pod, nil, nil)
	return err
}

func (p *plugin) StopPodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("StopPodSandbox", pod, nil, nil)
	return err
}

func (p *plugin) RemovePodSandbox(_ context.Context, pod *api.PodSandbox) error {
	_, err := p.event("RemovePodSandbox", pod, nil, nil)
	return err
}

func (p *plugin) CreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) (*api.ContainerAdjustment, []*api.ContainerUpdate, error) {
	found, err := p.event("CreateContainer", pod, container, nil)
	if err != nil {
		return nil, nil, err
	}
	var adjust *api.ContainerAdjustment
	if found.Adjust != nil {
		adjust = &api.ContainerAdjustment{}
		fail(protojson.Unmarshal(found.Adjust, adjust))
	}
	p.evicts(found.Evict)
	return adjust, updates(found.Update), nil
}

func (p *plugin) PostCreateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	_, err := p.event("PostCreateContainer", pod, container, nil)
	return err
}

func (p *plugin) StartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	_, err := p.event("StartContainer", pod, container, nil)
	return err
}

func (p *plugin) PostStartContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	_, err := p.event("PostStartContainer", pod, container, nil)
	return err
}

func (p *plugin) UpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container, resources *api.LinuxResources) ([]*api.ContainerUpdate, error) {
	found, err := p.event("UpdateContainer", pod, container, map[string]any{"resources": raw(resources)})
	p.evicts(found.Evict)
	return updates(found.Update), err
}

func (p *plugin) PostUpdateContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	_, err := p.event("PostUpdateContainer", pod, container, nil)
	return err
}

func (p *plugin) StopContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) ([]*api.ContainerUpdate, error) {
	found, err := p.event("StopContainer", pod, container, nil)
	return updates(found.Update), err
}

func (p *plugin) RemoveContainer(_ context.Context, pod *api.PodSandbox, container *api.Container) error {
	_, err := p.event("RemoveContainer", pod, container, nil)
	return err
}

func (p *plugin) ValidateContainerAdjustment(_ context.Context, request *api.ValidateContainerAdjustmentRequest) error {
	updated, about := []json.RawMessage{}, map[string]bool{"": true}
	for _, update := range request.Update {
		updated = append(updated, raw(update))
		about[update.ContainerId] = true
	}
	found, err := p.event("ValidateContainerAdjustment", request.Pod, request.Container,
		map[string]any{"adjust": raw(request.Adjust), "owners": raw(request.Owners), "update": updated})
	if !about[found.IfUpdated] {
		return nil
	}
	return err
}

func (p *plugin) run(options []stub.Option) error {
	ended := make(chan struct{}, 1)
	made, err := stub.New(p, append(options, stub.WithOnClose(func() { ended <- struct{}{} }))...)
	if err != nil {
		return err
	}
	p.stub = made
	if err := made.Start(context.Background()); err != nil {
		return err
	}
	made.Wait()
	return nil
}

func main() {
	socket, idx, name, once := flag.String("socket", "", ""), flag.String("idx", "", ""), flag.String("name", "", ""), flag.Bool("once", false, "")
	p := &plugin{}
	flag.StringVar(&p.log, "log", "", "")
	flag.StringVar(&p.script, "script", "", "")
	method := flag.String("call", "", "")
	flag.Parse()
	if *method != "" {
		fail(call(*socket, *method))
		return
	}
	options := []stub.Option{stub.WithTTRPCOptions(
		[]ttrpc.ClientOpts{ttrpc.WithUnaryClientInterceptor(p.asks)}, []ttrpc.ServerOpt{ttrpc.WithUnaryServerInterceptor(p.answers)})}
	if *socket != "" {
		options = append(options, stub.WithSocketPath(*socket), stub.WithPluginIdx(*idx), stub.WithPluginName(*name))
	} else {
		*once = true
	}
	go func() {
		lines := bufio.NewScanner(os.Stdin)
		for lines.Scan() {
			given := answer{}
			fail(json.Unmarshal(lines.Bytes(), &given))
			p.evicts(given.Evict)
			failed, err := p.stub.UpdateContainers(updates(given.Update))
			entry := map[string]any{"event": "Updated", "failed": []string{}}
			for _, update := range failed {
				entry["failed"] = append(entry["failed"].([]string), update.ContainerId)
			}
			if err != nil {
				entry["error"] = err.Error()
			}
			p.write(entry)
		}
	}()
	for {
		err := p.run(options)
		if *once {
			fail(err)
			return
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, "nri-plugin:", err)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
