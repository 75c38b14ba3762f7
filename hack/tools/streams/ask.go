package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"strconv"

	core "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/httpstream"
	"k8s.io/client-go/tools/portforward"
)

type answer struct {
	Port   string `json:"port"`
	Answer string `json:"answer"`
	Error  string `json:"error"`
}

func write(value any) error {
	return json.NewEncoder(os.Stdout).Encode(value)
}

// ask makes one connection and a pair of streams on it for each port, one after the other. (client-go's own forward
// gives its connection up at the first error; what the server does then is seen here.)
func (c client) ask(path string, ports []string) error {
	dialer, err := c.dialer(path)
	if err != nil {
		return err
	}
	connection, protocol, err := dialer.Dial(portforward.PortForwardProtocolV1Name)
	if err != nil {
		return fmt.Errorf("upgrade: %w", err)
	}
	defer connection.Close()
	if protocol != portforward.PortForwardProtocolV1Name {
		return fmt.Errorf("the server chose protocol %q", protocol)
	}
	for number, port := range ports {
		got, err := request(connection, port, number)
		if err != nil {
			return fmt.Errorf("port %s: %w", port, err)
		}
		if err := write(got); err != nil {
			return err
		}
	}
	return nil
}

// request asks one port for /index.html.
func request(connection httpstream.Connection, port string, number int) (answer, error) {
	got := answer{Port: port}
	headers := http.Header{}
	headers.Set(core.PortHeader, port)
	headers.Set(core.PortForwardRequestIDHeader, strconv.Itoa(number))
	headers.Set(core.StreamType, core.StreamTypeError)
	errors, err := connection.CreateStream(headers)
	if err != nil {
		return got, fmt.Errorf("error stream: %w", err)
	}
	if err := errors.Close(); err != nil {
		return got, fmt.Errorf("close the error stream: %w", err)
	}
	headers.Set(core.StreamType, core.StreamTypeData)
	data, err := connection.CreateStream(headers)
	if err != nil {
		return got, fmt.Errorf("data stream: %w", err)
	}
	defer connection.RemoveStreams(errors, data)
	// At a closed port either side may be first: what counts is what the server says on the error stream.
	if _, err := io.WriteString(data, "GET /index.html HTTP/1.0\r\n\r\n"); err == nil {
		text, _ := io.ReadAll(data)
		got.Answer = string(text)
	}
	_ = data.Reset()
	text, err := io.ReadAll(errors)
	if err != nil {
		return got, fmt.Errorf("read the error stream: %w", err)
	}
	got.Error = string(text)
	return got, nil
}
