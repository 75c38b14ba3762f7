package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	_ "k8s.io/cri-api/pkg/apis/runtime/v1" // the messages by their names
)

// call makes one call of CRI's RuntimeService, for which crictl has no command: the request is JSON on stdin, the answer JSON
// on stdout; an error goes to stderr, and the exit status is 1.
func call(socket, method string) error {
	text, err := io.ReadAll(os.Stdin)
	if err != nil {
		return err
	}
	named := func(suffix string) (protoreflect.ProtoMessage, error) {
		kind, err := protoregistry.GlobalTypes.FindMessageByName(protoreflect.FullName("runtime.v1." + method + suffix))
		if err != nil {
			return nil, err
		}
		return kind.New().Interface(), nil
	}
	request, err := named("Request")
	if err != nil {
		return err
	}
	answer, err := named("Response")
	if err != nil {
		return err
	}
	if err := protojson.Unmarshal(text, request); err != nil {
		return err
	}
	connection, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer connection.Close()
	limited, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	if err := connection.Invoke(limited, "/runtime.v1.RuntimeService/"+method, request, answer); err != nil {
		return err
	}
	fmt.Println(string(raw(answer)))
	return nil
}
