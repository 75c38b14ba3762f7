// The client of tests/kubelet: exec, attach and port-forward at kubelet's own server, with Kubernetes' client library.
//
//	kubelet-streams exec    [-tty -size WxH,WxH...] [-stdin] PATH?QUERY
//	kubelet-streams attach  ... as exec
//	kubelet-streams forward PATH LOCAL:REMOTE...
//	kubelet-streams ask     PATH PORT...
//
// PATH is that of kubelet's API, with the query (/exec/default/pod/container?command=ls&output=1). exec and attach join
// the streams that the query names with their own and end with the command's exit code; every SIGWINCH tells the
// next size. forward writes {"ports": [LOCAL...]} and goes on until its stdin ends. ask sends one HTTP request after
// the other to ports of the pod, all over one connection, and writes {"port": N, "answer": TEXT, "error": TEXT} for each.
// What fails otherwise ends with 125 and a line on stderr.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
)

// failed is the exit status when the call itself fails: no command of the test ends with it.
const failed = 125

// The transports by name. With "websocket", kubelet itself speaks WebSocket and the runtime gets SPDY;
// "websocket-v4" is a protocol that kubelet passes on to the runtime as it is.
const (
	overSPDY        = "spdy"
	overWebSocket   = "websocket"
	overWebSocketV4 = "websocket-v4"
)

type client struct {
	server    string
	transport string
	tty       bool
	stdin     bool
	sizes     string
}

func (c client) config() *rest.Config {
	return &rest.Config{Host: c.server, TLSClientConfig: rest.TLSClientConfig{Insecure: true}}
}

func (c client) url(path string) (*url.URL, error) {
	return url.Parse(c.server + path)
}

func (c client) executor(path string) (remotecommand.Executor, error) {
	target, err := c.url(path)
	if err != nil {
		return nil, err
	}
	switch c.transport {
	case overSPDY:
		return remotecommand.NewSPDYExecutor(c.config(), http.MethodPost, target)
	case overWebSocket:
		return remotecommand.NewWebSocketExecutor(c.config(), http.MethodGet, target.String())
	case overWebSocketV4:
		return remotecommand.NewWebSocketExecutorForProtocols(c.config(), http.MethodGet, target.String(), "v4.channel.k8s.io")
	}
	return nil, fmt.Errorf("-transport %q: exec and attach know spdy, websocket and websocket-v4", c.transport)
}

// run does exec and attach.
func (c client) run(path string) error {
	executor, err := c.executor(path)
	if err != nil {
		return err
	}
	options := remotecommand.StreamOptions{Stdout: os.Stdout, Tty: c.tty}
	if c.stdin {
		options.Stdin = os.Stdin
	}
	if c.tty {
		if options.TerminalSizeQueue, err = newSizes(c.sizes); err != nil {
			return err
		}
	} else {
		options.Stderr = os.Stderr
	}
	return executor.StreamWithContext(context.Background(), options)
}

// sizes tells the first size at once and the next one at each SIGWINCH.
type sizes struct {
	left    []remotecommand.TerminalSize
	changed chan os.Signal
	begun   bool
}

func newSizes(list string) (*sizes, error) {
	s := &sizes{changed: make(chan os.Signal, 8)}
	for _, one := range strings.Split(list, ",") {
		var size remotecommand.TerminalSize
		if _, err := fmt.Sscanf(one, "%dx%d", &size.Width, &size.Height); err != nil {
			return nil, fmt.Errorf("-size %q: wanted WIDTHxHEIGHT, by commas: %w", list, err)
		}
		s.left = append(s.left, size)
	}
	signal.Notify(s.changed, syscall.SIGWINCH)
	return s, nil
}

// Next waits for a size; nil: there is none any more.
func (s *sizes) Next() *remotecommand.TerminalSize {
	if s.begun {
		<-s.changed
	}
	s.begun = true
	if len(s.left) == 0 {
		return nil
	}
	size := s.left[0]
	s.left = s.left[1:]
	return &size
}

func (c client) dialer(path string) (httpstream.Dialer, error) {
	target, err := c.url(path)
	if err != nil {
		return nil, err
	}
	switch c.transport {
	case overSPDY:
		transport, upgrader, err := spdy.RoundTripperFor(c.config())
		if err != nil {
			return nil, err
		}
		return spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, target), nil
	case overWebSocket:
		return portforward.NewSPDYOverWebsocketDialer(target, c.config())
	}
	return nil, fmt.Errorf("-transport %q: port-forward knows spdy and websocket", c.transport)
}

// forward serves the local ports until stdin ends.
func (c client) forward(path string, ports []string) error {
	dialer, err := c.dialer(path)
	if err != nil {
		return err
	}
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.NewOnAddresses(dialer, []string{"127.0.0.1"}, ports, stop, ready, nil, os.Stderr)
	if err != nil {
		return err
	}
	ended := make(chan error, 1)
	go func() { ended <- forwarder.ForwardPorts() }()
	select {
	case err := <-ended:
		return err
	case <-ready:
	}
	got, err := forwarder.GetPorts()
	if err != nil {
		return err
	}
	locals := []uint16{}
	for _, one := range got {
		locals = append(locals, one.Local)
	}
	if err := write(map[string]any{"ports": locals}); err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin)
		close(stop)
	}()
	return <-ended
}

func do(arguments []string) error {
	if len(arguments) == 0 {
		return errors.New("wanted: exec, attach, forward or ask")
	}
	var c client
	flags := flag.NewFlagSet(arguments[0], flag.ExitOnError)
	flags.StringVar(&c.server, "server", "https://127.0.0.1:10250", "kubelet's server")
	flags.StringVar(&c.transport, "transport", overSPDY, "spdy, websocket or websocket-v4")
	flags.BoolVar(&c.tty, "tty", false, "a terminal")
	flags.BoolVar(&c.stdin, "stdin", false, "pass stdin on")
	flags.StringVar(&c.sizes, "size", "80x24", "the terminal's sizes, by commas")
	if err := flags.Parse(arguments[1:]); err != nil {
		return err
	}
	rest := flags.Args()
	if len(rest) == 0 {
		return fmt.Errorf("%s: PATH is missing", arguments[0])
	}
	switch arguments[0] {
	case "exec", "attach":
		return c.run(rest[0])
	case "forward":
		return c.forward(rest[0], rest[1:])
	case "ask":
		return c.ask(rest[0], rest[1:])
	}
	return fmt.Errorf("%q: wanted exec, attach, forward or ask", arguments[0])
}

func main() {
	err := do(os.Args[1:])
	var code exec.CodeExitError
	switch {
	case err == nil:
	case errors.As(err, &code):
		os.Exit(code.Code)
	default:
		fmt.Fprintln(os.Stderr, "kubelet-streams:", err)
		os.Exit(failed)
	}
}
